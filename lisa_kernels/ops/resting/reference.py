"""Weights at rest in plain PyTorch: the definition that every kernel equals bit for bit.

A block of 64 neighbours in memory shares one scale, near its absmax.

    int8: code = round_to_even(x · 127 / scale), a signed byte; it means code · scale / 127
    nf4:  code = the nearest of 16 levels to x / scale, of two the lower; it means level · scale

Levels are those of bitsandbytes' NF4 (QLoRA, arXiv 2305.14314: quantiles of a normal distribution), and so is the place
of a code: two to a byte, the first in the upper half. An odd last one has the code of zero beside it.

Scales are quantised once more (double quantisation, ibid.), each to a byte, by groups of 32 blocks. As integers, the
bits of positive float32 numbers are nearly their logarithms: in these the 256 scales of a group are evenly apart, from
its smallest absmax, rounded down to 16 bits, to its largest or a little beyond, so that a scale lies within half a step
of its absmax: 0.3 % where absmaxes differ threefold. Codes are made for the scale, not the absmax. A group's record:

    uint32, low bytes first: the lowest scale's upper 16 bits, and below them the step, in units of 256
    uint8 [32]: which of the scales each block has
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
BLOCKS_OF_GROUP = 32
GROUP = BLOCK * BLOCKS_OF_GROUP
RECORD = 4 + BLOCKS_OF_GROUP
# Below this a block's scale would overflow its reciprocal; such blocks keep their small values on a fixed scale.
SMALLEST_ABSMAX = 2.0**-120
# Steps are multiples of this, and this much more than a step's 255 holds the largest absmax.
STEP_UNIT = 256
STEPS = 255
INFINITY_BITS = 0x7F800000
# Of a group with an infinity or a NaN: all its weights are NaN.
NAN_BITS = 0x7FC00000
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


def encode_scales(absmax: Tensor) -> Tensor:
    """Return the records, uint8 [36 · ceil(blocks / 32)], of the absmax of blocks, float32 [blocks], positive."""
    missing = -absmax.numel() % BLOCKS_OF_GROUP
    bits = torch.nn.functional.pad(absmax.view(torch.int32).to(torch.int64), (0, missing), value=-1)
    bits = bits.view(-1, BLOCKS_OF_GROUP)
    high = bits.amax(1, keepdim=True)
    low = torch.where(bits < 0, high, bits).amin(1, keepdim=True) >> 16 << 16
    step = -((low - high) // (STEPS * STEP_UNIT))
    finite = high < INFINITY_BITS
    low, step = torch.where(finite, low, NAN_BITS), torch.where(finite, step, 0)
    size = (step * STEP_UNIT).clamp_min(1)
    places = torch.where(finite & (bits >= 0), (bits - low + size // 2) // size, 0).to(torch.uint8)
    return torch.cat([(low | step).to(torch.int32).view(torch.uint8), places], dim=1).flatten()


def decode_scales(scales: Tensor, blocks: int) -> Tensor:
    """Return the scale of each block, float32 [blocks], of their records, uint8."""
    records = scales.view(-1, RECORD)
    words = records[:, :4].contiguous().view(torch.int32).to(torch.int64)
    bits = (words >> 16 << 16) + records[:, 4:].to(torch.int64) * ((words & 0xFFFF) * STEP_UNIT)
    return bits.to(torch.int32).view(torch.float32).flatten()[:blocks]


def _per_element(per_block: Tensor, count: int) -> Tensor:
    return per_block.repeat_interleave(BLOCK)[:count]


def _scales(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the records of the scales of `values`, and the scales as they will be read."""
    absmax = block_absmax(values)
    records = encode_scales(absmax)
    return records, decode_scales(records, absmax.numel())


def quantize_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes uint8 [n], the bits of signed bytes; scales uint8, see above) of `values`, any float dtype [n]."""
    values = values.to(torch.float32)
    records, scales = _scales(values)
    scaled = values * _per_element(scales.reciprocal() * 127, values.numel())
    return scaled.clamp(-127, 127).round().to(torch.int8).view(torch.uint8), records


def quantize_nf4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes uint8 [ceil(n / 2)], scales uint8, see above) of `values`, any float dtype [n]."""
    values = values.to(torch.float32)
    records, scales = _scales(values)
    scaled = values * _per_element(scales.reciprocal(), values.numel())
    code = torch.bucketize(scaled, torch.tensor(MIDDLES, device=values.device), out_int32=True).to(torch.uint8)
    pairs = torch.nn.functional.pad(code, (0, code.numel() % 2), value=ZERO).view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1], records


def dequantize_int8(codes: Tensor, scales: Tensor, count: int) -> Tensor:
    """Return the values, float32 [count], of uint8 `codes` [count] and uint8 `scales`."""
    scale = decode_scales(scales, -(-count // BLOCK)) * INVERSE_127
    return codes.view(torch.int8).to(torch.float32) * _per_element(scale, count)


def dequantize_nf4(codes: Tensor, scales: Tensor, count: int) -> Tensor:
    """Return the values, float32 [count], of uint8 `codes` [ceil(count / 2)] and uint8 `scales`."""
    pairs = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[:count]
    levels = torch.tensor(LEVELS, device=codes.device)
    return levels[pairs.to(torch.int64)] * _per_element(decode_scales(scales, -(-count // BLOCK)), count)
