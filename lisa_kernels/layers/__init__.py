"""The bridge to a model: find its decoder blocks, give linears a low-rank slot, keep frozen what is frozen."""

from lisa_kernels.layers.blocks import ModelParts, find_blocks, split_model
from lisa_kernels.layers.freezing import FreezeGuard, check_attachable
from lisa_kernels.layers.lowrank import LowRankLinear, find_linears, is_linear, linear_shape, swap_linears

__all__ = [
    "FreezeGuard",
    "LowRankLinear",
    "ModelParts",
    "check_attachable",
    "find_blocks",
    "find_linears",
    "is_linear",
    "linear_shape",
    "split_model",
    "swap_linears",
]
