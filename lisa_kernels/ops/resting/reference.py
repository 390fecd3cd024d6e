"""Weights at rest in plain PyTorch: the definition that every kernel equals bit for bit.

A block of 64 neighbours in memory shares one float32 absmax.

    int8: code = round_to_even(x · 127 / absmax), a signed byte; it means code · absmax / 127
    nf4:  code = the nearest of 16 levels to x / absmax, of two the lower; it means level · absmax

Levels are those of bitsandbytes' NF4 (QLoRA, arXiv 2305.14314: quantiles of a normal distribution), and so is the place
of a code: two to a byte, the first in the upper half. An odd last one has the code of zero beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
# Below this a block's scale would overflow its reciprocal; such blocks keep their small values on a fixed scale.
SMALLEST_ABSMAX = 2.0**-120
# float32(1 / 127).
INVERSE_127 = 0.007874015718698502
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
ZERO = LEVELS.index(0.0)
# Between each level and the next, float32.
MIDDLES = tuple(((torch.tensor(LEVELS[:-1]) + torch.tensor(LEVELS[1:])) / 2).tolist())


def block_absmax(values: Tensor) -> Tensor:
    """Return float32 [ceil(n / 64)], the largest magnitude of each block of `values` (float32 [n])."""
    padded = torch.nn.functional.pad(values.abs(), (0, -values.numel() % BLOCK))
    return padded.view(-1, BLOCK).amax(dim=1).clamp_min(SMALLEST_ABSMAX)


def _per_element(per_block: Tensor, count: int) -> Tensor:
    return per_block.repeat_interleave(BLOCK)[:count]


def quantize_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes uint8 [n], the bits of signed bytes; absmax float32 [blocks]) of `values`, any float dtype [n]."""
    values = values.to(torch.float32)
    absmax = block_absmax(values)
    scaled = values * _per_element(absmax.reciprocal() * 127, values.numel())
    return scaled.round().to(torch.int8).view(torch.uint8), absmax


def quantize_nf4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes uint8 [ceil(n / 2)], absmax float32 [blocks]) of `values`, any float dtype [n]."""
    values = values.to(torch.float32)
    absmax = block_absmax(values)
    scaled = values * _per_element(absmax.reciprocal(), values.numel())
    code = torch.bucketize(scaled, torch.tensor(MIDDLES, device=values.device), out_int32=True).to(torch.uint8)
    pairs = torch.nn.functional.pad(code, (0, code.numel() % 2), value=ZERO).view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1], absmax


def dequantize_int8(codes: Tensor, absmax: Tensor, count: int) -> Tensor:
    """Return the values, float32 [count], of uint8 `codes` [count] and float32 `absmax` [blocks]."""
    return codes.view(torch.int8).to(torch.float32) * _per_element(absmax * INVERSE_127, count)


def dequantize_nf4(codes: Tensor, absmax: Tensor, count: int) -> Tensor:
    """Return the values, float32 [count], of uint8 `codes` [ceil(count / 2)] and float32 `absmax` [blocks]."""
    pairs = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[:count]
    levels = torch.tensor(LEVELS, device=codes.device)
    return levels[pairs.to(torch.int64)] * _per_element(absmax, count)
