"""Weights at rest in Triton, bit for bit what the reference defines."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lisa_kernels.ops.blockwise8.triton_kernel import block_absmax, load_absmax, reciprocal, store_absmax
from lisa_kernels.ops.resting.reference import BLOCK, LEVELS, MIDDLES
from lisa_kernels.ops.tiles import (
    ACCESS_BYTES,
    ELEMENT,
    VECTOR,
    WARP,
    Launch,
    tile_shape,
    vector_of,
    warp_size,
)
from lisa_kernels.ops.tiles.triton_kernel import (
    ELEMENT_TILE,
    advance,
    element_pointers,
    load,
    load_floats,
    store,
    tile_mask,
    tile_offsets,
)

INVERSE_127 = tl.constexpr(0.007874015718698502)
# Added to a small number it leaves the nearest integer, ties to even, in the sum's lower bits.
ROUNDING = tl.constexpr(1.5 * 2.0**23)
LEVEL = tl.constexpr(LEVELS)
MIDDLE = tl.constexpr(MIDDLES)


@triton.jit
def encode_int8(scaled):
    """The signed byte nearest to a number, as an unsigned one."""
    return (scaled + ROUNDING).to(tl.uint32, bitcast=True).to(tl.uint8)


@triton.jit
def encode_nf4(scaled):
    """The place among the levels of the one nearest to a number, of two the lower: its bits by halving."""
    fourth = scaled > MIDDLE[7]
    third = scaled > tl.where(fourth, MIDDLE[11], MIDDLE[3])
    second = scaled > tl.where(
        fourth, tl.where(third, MIDDLE[13], MIDDLE[9]), tl.where(third, MIDDLE[5], MIDDLE[1])
    )  # fmt: skip
    upper = tl.where(
        third, tl.where(second, MIDDLE[14], MIDDLE[12]), tl.where(second, MIDDLE[10], MIDDLE[8])
    )  # fmt: skip
    lower = tl.where(
        third, tl.where(second, MIDDLE[6], MIDDLE[4]), tl.where(second, MIDDLE[2], MIDDLE[0])
    )  # fmt: skip
    first = scaled > tl.where(fourth, upper, lower)
    return tl.where(fourth, 8, 0) | tl.where(third, 4, 0) | tl.where(second, 2, 0) | tl.where(first, 1, 0)


@triton.jit
def decode_nf4(code):
    """The level at a place: of the pairs by its last bit, of those by the one before it, and so on."""
    first, second, third, fourth = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    low = tl.where(
        third,
        tl.where(second, tl.where(first, LEVEL[7], LEVEL[6]), tl.where(first, LEVEL[5], LEVEL[4])),
        tl.where(second, tl.where(first, LEVEL[3], LEVEL[2]), tl.where(first, LEVEL[1], LEVEL[0])),
    )
    high = tl.where(
        third,
        tl.where(second, tl.where(first, LEVEL[15], LEVEL[14]), tl.where(first, LEVEL[13], LEVEL[12])),
        tl.where(second, tl.where(first, LEVEL[11], LEVEL[10]), tl.where(first, LEVEL[9], LEVEL[8])),
    )
    return tl.where(fourth, high, low)


@triton.jit
def pair_pointers(pointer, offsets, SHIFT: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to the bytes of a step that hold two codes each."""
    return pointer + offsets // 2 + tl.arange(0, VECTOR // 2)[None, None, :] + SHIFT // 2


@triton.jit
def pair_mask(offsets, SHIFT: tl.constexpr, left, VECTOR: tl.constexpr, ACCESS: tl.constexpr):
    """Which of these bytes exist: those with a first element."""
    if ACCESS == ELEMENT_TILE:
        mask = offsets + (SHIFT + 2 * tl.arange(0, VECTOR // 2)[None, None, :]) < left
    else:
        mask = offsets + SHIFT < left
    return mask


@triton.jit
def encode_step(
    values, codes, offsets, SHIFT: tl.constexpr, left, scale, FOUR_BITS: tl.constexpr, VECTOR: tl.constexpr,
    ACCESS: tl.constexpr,
):  # fmt: skip
    """Encode and store one step of a tile."""
    mask = tile_mask(offsets, SHIFT, left, VECTOR, ACCESS)
    scaled = load_floats(values, offsets, SHIFT, mask, VECTOR, ACCESS) * scale
    if FOUR_BITS:
        code = encode_nf4(scaled)
        first, second = tl.split(tl.reshape(code, (offsets.shape[0], offsets.shape[1], VECTOR // 2, 2)))
        there = pair_mask(offsets, SHIFT, left, VECTOR, ACCESS)
        store(pair_pointers(codes, offsets, SHIFT, VECTOR), ((first << 4) | second).to(tl.uint8), there, ACCESS)
    else:
        store(element_pointers(codes, offsets, SHIFT, VECTOR), encode_int8(scaled), mask, ACCESS)


@triton.jit
def decode_step(
    codes, values, offsets, SHIFT: tl.constexpr, left, absmax, FOUR_BITS: tl.constexpr, VECTOR: tl.constexpr,
    ACCESS: tl.constexpr,
):  # fmt: skip
    """Decode and store one step of a tile."""
    mask = tile_mask(offsets, SHIFT, left, VECTOR, ACCESS)
    if FOUR_BITS:
        there = pair_mask(offsets, SHIFT, left, VECTOR, ACCESS)
        pair = load(pair_pointers(codes, offsets, SHIFT, VECTOR), there, ACCESS).to(tl.int32)
        level = tl.join(decode_nf4(pair >> 4), decode_nf4(pair))
        value = tl.reshape(level, (offsets.shape[0], offsets.shape[1], VECTOR)) * absmax
    else:
        code = load(element_pointers(codes, offsets, SHIFT, VECTOR), mask, ACCESS)
        value = code.to(tl.int8, bitcast=True).to(tl.float32) * (absmax * INVERSE_127)
    pointers = element_pointers(values, offsets, SHIFT, VECTOR)
    store(pointers, value.to(values.dtype.element_ty), mask, ACCESS)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["values", "codes", "absmax"])
def quantize_resting_kernel(
    values, codes, absmax, count: tl.int64,
    FOUR_BITS: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, STEPS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Encode one program's blocks."""
    TILE: tl.constexpr = ROWS * LANES * VECTOR * STEPS
    start = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(count - start, TILE).to(tl.int32)
    values = advance(values, start, ACCESS)
    codes = advance(codes, start // 2 if FOUR_BITS else start, ACCESS)
    offsets = tile_offsets(ROWS, LANES, VECTOR, BLOCK)
    largest = tl.zeros([ROWS, LANES, VECTOR], tl.float32)
    for step in tl.static_range(STEPS):
        mask = tile_mask(offsets, step * LANES * VECTOR, left, VECTOR, ACCESS)
        x = load_floats(values, offsets, step * LANES * VECTOR, mask, VECTOR, ACCESS)
        largest = tl.maximum(largest, tl.abs(x))
    largest = block_absmax(largest)
    store_absmax(absmax + start // BLOCK, largest, left, LANES, VECTOR, BLOCK, ACCESS)
    scale = reciprocal(largest)
    if not FOUR_BITS:
        scale = scale * 127.0
    for step in tl.static_range(STEPS):
        encode_step(values, codes, offsets, step * LANES * VECTOR, left, scale, FOUR_BITS, VECTOR, ACCESS)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["codes", "absmax", "values"])
def dequantize_resting_kernel(
    codes, absmax, values, count: tl.int64,
    FOUR_BITS: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, STEPS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Decode one program's blocks."""
    TILE: tl.constexpr = ROWS * LANES * VECTOR * STEPS
    start = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(count - start, TILE).to(tl.int32)
    values = advance(values, start, ACCESS)
    codes = advance(codes, start // 2 if FOUR_BITS else start, ACCESS)
    offsets = tile_offsets(ROWS, LANES, VECTOR, BLOCK)
    scale = load_absmax(absmax + start // BLOCK, left, ROWS, BLOCK, ACCESS)
    for step in tl.static_range(STEPS):
        decode_step(codes, values, offsets, step * LANES * VECTOR, left, scale, FOUR_BITS, VECTOR, ACCESS)


def _access(values: Tensor, codes: Tensor) -> int:
    aligned = values.data_ptr() % ACCESS_BYTES == 0 and codes.data_ptr() % ACCESS_BYTES == 0
    return VECTOR if aligned and values.numel() % vector_of(values.dtype) == 0 else ELEMENT


def quantize_launch(values: Tensor, codes: Tensor, absmax: Tensor, kind: str, warp: int = WARP) -> Launch:
    """Return the launch that encodes `values` into `codes` and `absmax`."""
    return _launch(quantize_resting_kernel, values, codes, absmax, kind, warp)


def dequantize_launch(codes: Tensor, absmax: Tensor, values: Tensor, kind: str, warp: int = WARP) -> Launch:
    """Return the launch that decodes `codes` and `absmax` into `values`."""
    return _launch(dequantize_resting_kernel, values, codes, absmax, kind, warp)


def _launch(
    kernel: triton.runtime.JITFunction, values: Tensor, codes: Tensor, absmax: Tensor, kind: str, warp: int
) -> Launch:
    shape = tile_shape(BLOCK, vector_of(values.dtype), warp)
    constants = {"FOUR_BITS": kind == "nf4", "ACCESS": _access(values, codes), **shape.constants()}
    arguments: dict[str, Tensor | int] = {"values": values, "codes": codes, "absmax": absmax, "count": values.numel()}
    return Launch(kernel, arguments, constants, -(-values.numel() // shape.elements), shape.num_warps)


def quantize(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Encode `values` [n] on a GPU; the contract is the package's."""
    n = values.numel()
    codes = torch.empty(-(-n // 2) if kind == "nf4" else n, dtype=torch.uint8, device=values.device)
    absmax = torch.empty(-(-n // BLOCK), dtype=torch.float32, device=values.device)
    if n:
        quantize_launch(values, codes, absmax, kind, warp_size(values.device)).run()
    return codes, absmax


def dequantize_(out: Tensor, codes: Tensor, absmax: Tensor, kind: str) -> None:
    """Decode into `out` [n] on a GPU; the contract is the package's."""
    if out.numel():
        dequantize_launch(codes, absmax, out, kind, warp_size(out.device)).run()
