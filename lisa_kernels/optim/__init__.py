"""Optimizers: thin `torch.optim.Optimizer` classes over the operations in `lisa_kernels.ops`."""

from lisa_kernels.optim.adamw import AdamW8bit

__all__ = ["AdamW8bit"]
