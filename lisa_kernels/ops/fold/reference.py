"""W ← (1 − lr·wd) W + Bᵀ P in plain PyTorch, a band of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.ops.random_bits import STOCHASTIC_ROUNDINGS, random_words, weight_bits

# Elements of W worked on at a time.
BAND_ELEMENTS = 1 << 20


def band_rows(columns: int) -> int:
    """Return how many rows of the weight are a band: whole fours, as a hash of random numbers serves four elements."""
    return max(4, BAND_ELEMENTS // max(columns, 1) // 4 * 4)


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 masters of bfloat16 weights and int16 remainders."""
    return (weight.to(torch.float32).view(torch.int32) + remainder).view(torch.float32)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bfloat16 weights and int16 remainders of finite float32 masters."""
    bits = master.contiguous().view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def fold_(
    weight: Tensor, left: Tensor, right: Tensor, decay: Tensor, key: Tensor | None, remainder: Tensor | None = None,
    start: int = 0,
) -> None:  # fmt: skip
    """Add leftᵀ · right to `decay` · weight in place; see the contract in the package."""
    rows, columns = weight.shape
    band = band_rows(columns)
    right = right.to(torch.float32)
    for row in range(0, rows, band):
        target = weight[row : row + band]
        rest = None if remainder is None else remainder[row : row + band]
        update = left[:, row : row + band].to(torch.float32).t() @ right
        old = target.to(torch.float32) if rest is None else join(target, rest)
        new = old * decay + update
        if rest is not None:
            for part, value in zip((target, rest), split(new)):
                part.copy_(value)
        elif key is not None and weight.dtype in STOCHASTIC_ROUNDINGS:
            bits = weight_bits(random_words(key, start + row * columns, new.numel()))
            target.copy_(STOCHASTIC_ROUNDINGS[weight.dtype](new, bits.view(new.shape)))
        else:
            target.copy_(new)
