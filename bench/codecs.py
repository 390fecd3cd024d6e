"""8-bit formats of AdamW's moments, side by side: ours, those that others ship, and some that might be better.

A codec holds one coding per moment. A coding turns float32 values [n], in blocks that share a scale, into codes and
scales and back; the uniform numbers [n] in [0, 1) that it is given decide stochastic rounding. All but our own codings
are tables of 256 values within [−1, 1] at most: slow, but any format is one.

Sources: bitsandbytes' map: dynamic quantisation, Dettmers, arXiv 1511.04561. FlashOptim: arXiv 2602.23349, algorithms
2 and 3; deviation: the scales of its groups stay float32 here, so that codes alone are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lisa_kernels.ops.blockwise8 import reference
from lisa_kernels.optim.interop import dynamic_code_map


class Coding(Protocol):
    """How one moment is stored."""

    @property
    def bytes_per_value(self) -> float:
        """Bytes of code and of the share in its block's scale."""
        ...

    def quantize(self, values: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return (codes [n], scales [blocks]) of float32 values [n], n a multiple of the block size."""
        ...

    def dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return float32 [n]."""
        ...


@dataclass(frozen=True)
class SmallFloats:
    """The codec of `lisa_kernels.ops.blockwise8`, by its definition: E4M3 if signed, else E5M3."""

    signed: bool
    stochastic: bool = True
    block_size: int = 256

    @property
    def bytes_per_value(self) -> float:
        """Bytes of code and of the share in its block's scale."""
        return 1 + 4 / self.block_size

    def quantize(self, values: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return (codes uint8 [n], absmax float32 [blocks])."""
        bits20 = (uniform * (1 << 20)).to(torch.int32) if self.stochastic else None
        return reference.quantize(values, self.signed, self.block_size, bits20)

    def dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return float32 [n]."""
        return reference.dequantize(codes, scales, self.signed, self.block_size)


@dataclass(frozen=True, eq=False)
class CodeTable:
    """A sorted table of at most 256 values times the absmax of a block.

    values: float32 [k], rising, within [−1, 1]. boundaries: float32 [k − 1], where nearest rounding goes from one code
    to the next; it may be done in another domain than the values'. floor: a value above 0 never becomes code 0.
    power_of_two: the scale is the absmax raised to a power of two.
    """

    values: Tensor
    boundaries: Tensor
    stochastic: bool = True
    floor: bool = False
    block_size: int = 256
    scale_bytes: int = 4
    power_of_two: bool = False

    @property
    def bytes_per_value(self) -> float:
        """Bytes of code and of the share in its block's scale."""
        return 1 + self.scale_bytes / self.block_size

    def quantize(self, values: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return (codes int64 [n], scales float32 [blocks])."""
        scales = reference.block_absmax(values, self.block_size)
        if self.power_of_two:
            # Rounded up, so that nothing exceeds 1.
            scales = torch.exp2(torch.ceil(torch.log2(scales)))
        scaled = (values.view(-1, self.block_size) / scales[:, None]).view(-1)
        scaled = scaled.clamp(self.values[0], self.values[-1])
        if self.stochastic:
            low = (torch.searchsorted(self.values, scaled, right=True) - 1).clamp_max(len(self.values) - 2)
            step = self.values.diff()
            codes = low + (uniform * step[low] < scaled - self.values[low])
        else:
            codes = torch.searchsorted(self.boundaries, scaled)
        return (torch.where(values > 0, codes.clamp_min(1), codes) if self.floor else codes), scales

    def dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return float32 [n]."""
        return (self.values[codes].view(-1, self.block_size) * scales[:, None]).view(-1)


@dataclass(frozen=True)
class Float32:
    """No quantisation at all: what the measurement itself gets wrong."""

    @property
    def bytes_per_value(self) -> float:
        """Bytes of the value."""
        return 4.0

    def quantize(self, values: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the values, no scales)."""
        return values, values.new_empty(0)

    def dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return float32 [n]."""
        return codes


@dataclass(frozen=True)
class Codec:
    """How both moments are stored."""

    name: str
    m: Coding
    v: Coding

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of codes and scales per parameter."""
        return self.m.bytes_per_value + self.v.bytes_per_value


# Tables


def _mirrored(magnitudes: Tensor) -> Tensor:
    return torch.cat([-magnitudes.flip(0), torch.zeros(1), magnitudes])


def _table(values: Tensor) -> CodeTable:
    return CodeTable(values, (values[1:] + values[:-1]) / 2)


def small_floats(exponent_bits: int, mantissa_bits: int, signed: bool) -> CodeTable:
    """Return the small floats of that many bits whose top is 1; code 0 is 0, there are no subnormals."""
    codes = torch.arange(1, 2 ** (exponent_bits + mantissa_bits), dtype=torch.float64)
    steps = 2**mantissa_bits
    magnitudes = torch.exp2(codes.div(steps, rounding_mode="floor")) * (1 + codes.remainder(steps) / steps)
    magnitudes = (magnitudes / magnitudes[-1]).float()
    return _table(_mirrored(magnitudes) if signed else torch.cat([torch.zeros(1), magnitudes]))


def tapered(segments: Sequence[tuple[int, int]], signed: bool) -> CodeTable:
    """Return 0 and small floats whose mantissas shorten: (binades, codes per binade) of each segment from the top down.

    Codes at the bottom that there is no room for are left out.
    """
    magnitudes: list[float] = []
    exponent = 0
    for binades, steps in segments:
        for _ in range(binades):
            exponent -= 1
            magnitudes += [2.0**exponent * (1 + step / steps) for step in reversed(range(steps))]
    kept = torch.tensor(magnitudes[: 127 if signed else 255], dtype=torch.float64).flip(0)
    kept = (kept / kept[-1]).float()
    return _table(_mirrored(kept) if signed else torch.cat([torch.zeros(1), kept]))


def logarithmic(binades: float, signed: bool) -> CodeTable:
    """Return 0 and values whose neighbours have one ratio, over that many factors of two below 1."""
    count = 127 if signed else 255
    exponents = torch.arange(1 - count, 1, dtype=torch.float64) * (binades / count)
    magnitudes = torch.exp2(exponents).float()
    return _table(_mirrored(magnitudes) if signed else torch.cat([torch.zeros(1), magnitudes]))


def powers(exponent: int, signed: bool) -> CodeTable:
    """Return (j / count) ** exponent: steps that are finer near the absmax and coarser far below it."""
    count = 127 if signed else 255
    magnitudes = ((torch.arange(1, count + 1, dtype=torch.float64) / count) ** exponent).float()
    return _table(_mirrored(magnitudes) if signed else torch.cat([torch.zeros(1), magnitudes]))


def dynamic_map(signed: bool) -> CodeTable:
    """Return bitsandbytes' map."""
    return _table(dynamic_code_map(signed))


def companded(signed: bool) -> CodeTable:
    """Return FlashOptim's codes, rounded in the companded domain: z = 2x / (1 + |x|) for m, z = √x for v."""

    def expand(z: Tensor) -> Tensor:
        return (z / (2 - z.abs()) if signed else z.square()).float()

    count = 127 if signed else 255
    codes = torch.arange(-count if signed else 0, count + 1, dtype=torch.float64)
    return CodeTable(expand(codes / count), expand((codes[:-1] + 0.5) / count))


# Codecs


def _nearest(name: str, m: CodeTable, v: CodeTable) -> Codec:
    return Codec(name, replace(m, stochastic=False), replace(v, stochastic=False))


def _fair(name: str, m: CodeTable, v: CodeTable) -> Codec:
    """Return the codec with a floor under v, rounded stochastically."""
    return Codec(name, m, replace(v, floor=True))


def _in_blocks(codec: Codec, block_size: int, scale_bytes: int = 4) -> Codec:
    def in_blocks(coding: Coding) -> CodeTable:
        assert isinstance(coding, CodeTable)
        return replace(coding, block_size=block_size, scale_bytes=scale_bytes)

    return Codec(f"{codec.name}, blocks of {block_size}", in_blocks(codec.m), in_blocks(codec.v))


FLOAT32 = Codec("float32 moments", Float32(), Float32())
OURS = Codec("E4M3 / E5M3, stochastic (ours)", SmallFloats(True), SmallFloats(False))
OURS_NEAREST = Codec("E4M3 / E5M3, nearest", SmallFloats(True, False), SmallFloats(False, False))
DYNAMIC_NEAREST = _nearest("bitsandbytes map, nearest", dynamic_map(True), dynamic_map(False))
DYNAMIC_NO_FLOOR = Codec("bitsandbytes map, stochastic, no floor", dynamic_map(True), dynamic_map(False))
DYNAMIC_FAIR = _fair("bitsandbytes map, floor, stochastic", dynamic_map(True), dynamic_map(False))
FLASHOPTIM = _in_blocks(_nearest("FlashOptim, nearest", companded(True), companded(False)), 32, 2)
FLASHOPTIM_FAIR = _in_blocks(_fair("FlashOptim, floor, stochastic", companded(True), companded(False)), 32, 2)
_E4M3, _E5M3 = small_floats(4, 3, True), small_floats(5, 3, False)
_TAPERED_M = tapered([(3, 16), (6, 8), (8, 4)], True)
_TAPERED_V = tapered([(8, 16), (8, 8), (16, 4)], False)
CANDIDATES = (
    _fair(
        "E4M3 / E5M3, power-of-two scales",
        replace(_E4M3, power_of_two=True), replace(_E5M3, power_of_two=True),
    ),
    _in_blocks(_fair("E4M3 / E5M3", _E4M3, _E5M3), 64),
    _fair("E3M4 / E5M3", small_floats(3, 4, True), _E5M3),
    _fair("E3M4 / E4M4", small_floats(3, 4, True), small_floats(4, 4, False)),
    _fair("logarithms, 16 / 32 binades", logarithmic(16, True), logarithmic(32, False)),
    _fair("floats of 4, 3, 2 mantissa bits", _TAPERED_M, _TAPERED_V),
    _fair("fourth powers / floats of 4, 3, 2 bits", powers(4, True), _TAPERED_V),
    _fair("fourth / eighth powers", powers(4, True), powers(8, False)),
)  # fmt: skip
CODECS = (
    FLOAT32, OURS, OURS_NEAREST, DYNAMIC_NEAREST, DYNAMIC_NO_FLOOR, DYNAMIC_FAIR, FLASHOPTIM, FLASHOPTIM_FAIR,
    *CANDIDATES,
)  # fmt: skip
