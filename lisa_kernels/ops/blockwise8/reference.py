"""The 8-bit codec in plain PyTorch: the definition that every kernel equals bit for bit.

A block of `block_size` values shares one float32 absmax. A magnitude code k with E = k >> 3 and M = k & 7 means

    first moment  (E4M3, 7 bits, sign in bit 7):  2**(E − 16) · (1 + M/8) · absmax / TOP
    second moment (E5M3, 8 bits, unsigned):       2**(E − 32) · (1 + M/8) · absmax / TOP

and k = 0 means 0. TOP is a hair below 0.9375, the value of the top code, so that absmax becomes the top code and no
value rounds beyond it. Because the layout is float32's own, encoding is: add 20 random bits below the three kept
mantissa bits, subtract the exponent offset, shift. A first moment below code 1 is the exception: it becomes code 1 or
0 with the odds that keep its mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Four units in the last place below 0.9375: three roundings lie between absmax and its scaled value.
TOP = 0.9375 - 4 * 2.0**-24
# float32(1 / TOP).
INVERSE_TOP = 1.0666669607162476
# What code 1 of a first moment stands for, before the block's scale; smaller magnitudes become it or 0, with odds that
# make the mean exact. (A second moment rounds up to code 1: as 0 it would let m / eps through.)
SMALLEST_M = 1.125 * 2.0**-16
# Below this a block's scale would overflow its reciprocal; such blocks keep their small values on a fixed scale.
SMALLEST_ABSMAX = 2.0**-120
_DROPPED_BITS = 20
_OFFSET = {True: 111 << 23, False: 95 << 23}
_HALF = 1 << (_DROPPED_BITS - 1)


def block_absmax(values: Tensor, block_size: int) -> Tensor:
    """Return float32 [ceil(n / block_size)], the largest magnitude of each block of `values` (float32 [n])."""
    magnitude = values.abs()
    tail = -values.numel() % block_size
    if tail:
        magnitude = torch.nn.functional.pad(magnitude, (0, tail))
    return magnitude.view(-1, block_size).amax(dim=1).clamp_min(SMALLEST_ABSMAX)


def _per_element(per_block: Tensor, block_size: int, count: int) -> Tensor:
    return per_block.repeat_interleave(block_size)[:count]


def quantize(values: Tensor, signed: bool, block_size: int, bits20: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (codes uint8 [n], absmax float32 [blocks]) of float32 `values` [n]; `bits20` None rounds to nearest."""
    absmax = block_absmax(values, block_size)
    scaled = values.abs() * _per_element(absmax.reciprocal() * TOP, block_size, values.numel())
    rounding = torch.full_like(values, _HALF, dtype=torch.int32) if bits20 is None else bits20.to(torch.int32)
    code = (scaled.view(torch.int32) + rounding - _OFFSET[signed]) >> _DROPPED_BITS
    if signed:
        threshold = rounding.to(torch.float32) * (SMALLEST_M / (1 << _DROPPED_BITS))
        code = torch.where(scaled > threshold, code.clamp_min(1), 0)
        return (code | (values.signbit().to(torch.int32) << 7)).to(torch.uint8), absmax
    return torch.maximum(code, (values > 0).to(torch.int32)).to(torch.uint8), absmax


def decode(codes: Tensor, signed: bool) -> Tensor:
    """Return what uint8 `codes` [n] stand for before their block's scale, float32 [n]."""
    code = codes.to(torch.int32)
    magnitude = code & 127 if signed else code
    value = ((magnitude << _DROPPED_BITS) + _OFFSET[signed]).view(torch.float32)
    value = torch.where(magnitude == 0, 0.0, value)
    return torch.where(code > 127, -value, value) if signed else value


def scales(absmax: Tensor, block_size: int, count: int, factor: float | Tensor = 1.0) -> Tensor:
    """Return `factor` times the scale of each of `count` values, float32 [count], of float32 `absmax` [blocks]."""
    return _per_element(absmax * INVERSE_TOP * factor, block_size, count)


def dequantize(codes: Tensor, absmax: Tensor, signed: bool, block_size: int) -> Tensor:
    """Return the values, float32 [n], of uint8 `codes` [n] and float32 `absmax` [blocks]."""
    return decode(codes, signed) * scales(absmax, block_size, codes.numel())
