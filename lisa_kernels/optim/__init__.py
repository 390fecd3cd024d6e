"""Optimizers: thin `torch.optim.Optimizer` classes over the operations in `lisa_kernels.ops`."""

from lisa_kernels.optim.adamw import AdamW8bit
from lisa_kernels.optim.interop import from_bitsandbytes, from_torch, to_bitsandbytes, to_torch

__all__ = ["AdamW8bit", "from_bitsandbytes", "from_torch", "to_bitsandbytes", "to_torch"]
