"""Weights at rest in 8 or 4 bits: contract, checks and `torch.library` schema.

`kind="int8"` takes 1.0176 bytes for a weight, `kind="nf4"` 0.5176, scales included; `reference` has the formulas. Codes
and scales are uint8 whatever they mean: what shares tensors out among processes leaves bytes alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.ops.library import triton_kernel, triton_present
from lisa_kernels.ops.resting import cpu_kernel, reference

KINDS = ("int8", "nf4")
GROUP, RECORD = reference.GROUP, reference.RECORD
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Weights that are in more than the bits they rest in at a time: 32 MiB in 16.
TILE_ELEMENTS = 1 << 24


def code_count(elements: int, kind: str) -> int:
    """Return how many bytes the codes of that many weights take."""
    return elements if kind == "int8" else -(-elements // 2)


def scale_count(elements: int) -> int:
    """Return how many bytes the scales of that many weights take."""
    return -(-elements // GROUP) * RECORD


def bytes_at_rest(elements: int, kind: str) -> int:
    """Return how many bytes that many weights take."""
    return code_count(elements, kind) + scale_count(elements)


@torch.library.custom_op("lisa_kernels::quantize_resting", mutates_args=())
def _quantize(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return reference.quantize_int8(values) if kind == "int8" else reference.quantize_nf4(values)


@_quantize.register_fake
def _(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    codes = values.new_empty((code_count(values.numel(), kind),), dtype=torch.uint8)
    return codes, values.new_empty((scale_count(values.numel()),), dtype=torch.uint8)


@torch.library.custom_op("lisa_kernels::dequantize_resting_", mutates_args=("out",))
def _dequantize(out: Tensor, codes: Tensor, scales: Tensor, kind: str) -> None:
    decode = reference.dequantize_int8 if kind == "int8" else reference.dequantize_nf4
    out.copy_(decode(codes, scales, out.numel()))


@_dequantize.register_fake
def _(out: Tensor, codes: Tensor, scales: Tensor, kind: str) -> None:
    return None


cpu_kernel.register(_quantize, _dequantize)
if triton_present():
    _TRITON = "lisa_kernels.ops.resting.triton_kernel"
    _quantize.register_kernel("cuda", triton_kernel(_TRITON, "quantize"))
    _dequantize.register_kernel("cuda", triton_kernel(_TRITON, "dequantize_"))


def quantize_resting(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Encode a weight in 8 or 4 bits, to nearest.

    weight: float32, bfloat16 or float16, any shape, contiguous, finite. kind: "int8" or "nf4". Returns codes uint8 [n]
    or [ceil(n / 2)], and scales uint8 [36 · ceil(n / 2048)], n being the number of elements.
    """
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    if weight.dtype not in DTYPES or not weight.is_contiguous():
        given = f"{weight.dtype}{'' if weight.is_contiguous() else ', not contiguous'}"
        raise InputError(f"the weight is {given}; float32, bfloat16 or float16, contiguous, is wanted.")
    codes, scales = _quantize(weight.view(-1), kind)
    return codes, scales


def dequantize_resting_(out: Tensor, codes: Tensor, scales: Tensor, kind: str) -> Tensor:
    """Decode what `quantize_resting` wrote into `out`, each weight rounded to nearest; returns `out`.

    out: float32, bfloat16 or float16, any shape, contiguous, mutated. codes, scales: those of as many elements, or the
    part of them for some rows that begin with a group of 2048 weights.
    """
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    if out.dtype not in DTYPES or not out.is_contiguous():
        given = f"{out.dtype}{'' if out.is_contiguous() else ', not contiguous'}"
        raise InputError(f"out is {given}; float32, bfloat16 or float16, contiguous, is wanted.")
    n = out.numel()
    wanted = [(code_count(n, kind),), (scale_count(n),)]
    if codes.dtype != torch.uint8 or scales.dtype != torch.uint8 or [codes.shape, scales.shape] != wanted:
        raise InputError(
            f"codes are {codes.dtype} {list(codes.shape)} and scales {scales.dtype} {list(scales.shape)}; {n} weights "
            f"in {kind} need uint8 [{wanted[0][0]}] and uint8 [{wanted[1][0]}]."
        )
    _dequantize(out.view(-1), codes.contiguous(), scales.contiguous(), kind)
    return out


def rows_of_a_tile(columns: int) -> int:
    """Return how many rows of a weight with so many columns are a tile: whole groups, whatever the columns."""
    unit = GROUP // math.gcd(columns, GROUP)
    return max(1, TILE_ELEMENTS // (unit * columns)) * unit


class RestingWeight(NamedTuple):
    """A weight [m, n] at rest: what `quantize_resting` made of it."""

    codes: Tensor
    scales: Tensor
    kind: str
    m: int
    n: int

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.m, self.n

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def is_meta(self) -> bool:
        """Whether there are no values: of a plan."""
        return self.codes.is_meta

    def is_finite(self) -> bool:
        """Return whether the weight that was quantised held neither NaN nor infinity; one without values has none."""
        upper = self.scales.view(-1, RECORD)[:, 2:4]
        return self.is_meta or not bool(((upper[:, 1] == 0x7F) & (upper[:, 0] >= 0x80)).any())

    def rows(self, rows: slice) -> RestingWeight:
        """Return some rows, which are whole groups, or the rest of all: views of codes and scales."""
        first, last = rows.start * self.n, rows.stop * self.n
        codes = self.codes[code_count(first, self.kind) : code_count(last, self.kind)]
        scales = self.scales[scale_count(first) : scale_count(last)]
        return RestingWeight(codes, scales, self.kind, rows.stop - rows.start, self.n)

    def woken(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the weight [m, n] in a float dtype; `out`: memory for it, of as many elements or more."""
        flat = self.scales.new_empty((self.m * self.n,), dtype=dtype) if out is None else out[: self.m * self.n]
        return dequantize_resting_(flat.view(self.m, self.n), self.codes, self.scales, self.kind)

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, the weight there in `dtype`) over the whole of it, each in the memory of the one before."""
        step = rows_of_a_tile(self.n)
        if step >= self.m:
            yield slice(0, self.m), self.woken(dtype)
            return
        buffer = self.scales.new_empty((step * self.n,), dtype=dtype)
        for start in range(0, self.m, step):
            rows = slice(start, min(start + step, self.m))
            yield rows, self.rows(rows).woken(dtype, buffer)
