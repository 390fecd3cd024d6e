"""The bridge to a model: find its decoder blocks, give linears a low-rank slot, keep frozen what is frozen."""

from lisa_kernels.layers.accumulating import AccumulatingSlot, accumulates, hold_masters
from lisa_kernels.layers.attachable import check_attachable, without_compiler
from lisa_kernels.layers.blocks import ModelParts, find_blocks, no_ones, output_layer, split_model, token_embedding
from lisa_kernels.layers.checkpointing import checkpoint_blocks
from lisa_kernels.layers.compiling import compile_blocks
from lisa_kernels.layers.dequantized import dequantize, quantised_by
from lisa_kernels.layers.embedding import (
    AccumulatingEmbedding,
    LowRankEmbedding,
    OrderedTables,
    TappedEmbedding,
    lookup_factor,
    tap_embedding,
)
from lisa_kernels.layers.freezing import FreezeGuard
from lisa_kernels.layers.linears import (
    check_untied,
    find_linears,
    is_conv1d,
    is_linear,
    is_trainable,
    linear_shape,
    untied,
)
from lisa_kernels.layers.loss import LossWithoutLogits, leave_out_logits
from lisa_kernels.layers.lowrank import LowRankLinear, ReadWeights, TrainedBasisLinear, swap_linears
from lisa_kernels.layers.offload import offload_checkpoints
from lisa_kernels.layers.plain_linears import PlainLinears
from lisa_kernels.layers.resting import RestingLinear, RestingTrainedBasisLinear
from lisa_kernels.layers.segments import attend_by_segments, attends_by_segments, borders_mask
from lisa_kernels.layers.slot import SlotModule
from lisa_kernels.layers.visits import Visits
from lisa_kernels.layers.woken import WokenLinear

__all__ = [
    "AccumulatingEmbedding",
    "AccumulatingSlot",
    "FreezeGuard",
    "LossWithoutLogits",
    "LowRankEmbedding",
    "LowRankLinear",
    "ModelParts",
    "OrderedTables",
    "PlainLinears",
    "ReadWeights",
    "RestingLinear",
    "RestingTrainedBasisLinear",
    "SlotModule",
    "TappedEmbedding",
    "TrainedBasisLinear",
    "Visits",
    "WokenLinear",
    "accumulates",
    "attend_by_segments",
    "attends_by_segments",
    "borders_mask",
    "check_attachable",
    "check_untied",
    "checkpoint_blocks",
    "compile_blocks",
    "dequantize",
    "find_blocks",
    "find_linears",
    "hold_masters",
    "is_conv1d",
    "is_linear",
    "is_trainable",
    "leave_out_logits",
    "linear_shape",
    "lookup_factor",
    "no_ones",
    "offload_checkpoints",
    "output_layer",
    "quantised_by",
    "split_model",
    "swap_linears",
    "tap_embedding",
    "token_embedding",
    "untied",
    "without_compiler",
]
