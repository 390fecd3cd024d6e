"""Fold on CPUs: torch's product of a band, then decay, sum and rounding in one pass of C++.

The bands and the products are the reference's own, so that the results are equal bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lisa_kernels import native
from lisa_kernels.native import DTYPE_CODES, Library, pointer
from lisa_kernels.ops.fold import reference

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef


def fold_(
    library: Library, weight: Tensor, left: Tensor, right: Tensor, decay: Tensor, key: Tensor | None,
    remainder: Tensor | None = None, start: int = 0,
) -> None:  # fmt: skip
    """Add leftᵀ · right to `decay` · weight in place; the contract is the package's. float64 weights stay in torch."""
    if weight.dtype not in DTYPE_CODES:
        reference.fold_(weight, left, right, decay, key, remainder, start)
        return
    rows, columns = weight.shape
    band = reference.band_rows(columns)
    number = 0 if key is None else int(key.item())
    scale, right = float(decay.item()), right.to(torch.float32)
    for row in range(0, rows, band):
        targets = [tensor[row : row + band] for tensor in (weight, remainder) if tensor is not None]
        update = left[:, row : row + band].to(torch.float32).t() @ right
        dense = [target.contiguous() for target in targets]
        places = [pointer("the weight", tensor, target.dtype) for tensor, target in zip(dense, targets)]
        library.call(
            "fold", places[0], places[1] if len(places) > 1 else None, pointer("the update", update, torch.float32),
            update.numel(), start + row * columns, scale, number, DTYPE_CODES[weight.dtype], key is not None,
        )  # fmt: skip
        for target, folded in zip(targets, dense):
            if folded.data_ptr() != target.data_ptr():
                target.copy_(folded)


def register(fold_op: CustomOpDef) -> None:
    """Run the op on CPU tensors through the compiled library; without one it keeps its definition."""
    library = native.load()
    if library is not None:
        fold_op.register_kernel("cpu", partial(fold_, library))
