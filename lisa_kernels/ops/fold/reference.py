"""W ← (1 − lr·wd) W + Bᵀ P in plain PyTorch, a band of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.ops.random_bits import random_key, random_words, round_to_bfloat16, weight_bits

# Elements of W worked on at a time.
BAND_ELEMENTS = 1 << 20


def fold_(
    weight: Tensor, left: Tensor, right: Tensor, decay: Tensor, clock: Tensor, stochastic: bool, seed: int,
    parameter: int,
) -> None:  # fmt: skip
    """Add leftᵀ · right to `decay` · weight in place; see the contract in the package."""
    rows, columns = weight.shape
    band = max(1, BAND_ELEMENTS // max(columns, 1))
    key = random_key(seed, parameter, clock)
    for start in range(0, rows, band):
        target = weight[start : start + band]
        update = left[:, start : start + band].to(torch.float32).t() @ right.to(torch.float32)
        new = target.to(torch.float32) * decay + update
        if stochastic and weight.dtype == torch.bfloat16:
            bits = weight_bits(random_words(key, start * columns, new.numel())[1])
            target.copy_(round_to_bfloat16(new, bits.view(new.shape)))
        else:
            target.copy_(new)
