"""Weights at rest in Triton, bit for bit what the reference defines."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lisa_kernels.ops.blockwise8.triton_kernel import reciprocal
from lisa_kernels.ops.resting.reference import (
    BLOCK,
    GROUP,
    INFINITY_BITS,
    LEVELS,
    MIDDLES,
    NAN_BITS,
    RECORD,
    SMALLEST_ABSMAX,
    STEP_UNIT,
    STEPS,
)
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
RECORD_BYTES = tl.constexpr(RECORD)
UNIT = tl.constexpr(STEP_UNIT)
ALL_STEPS = tl.constexpr(STEPS * STEP_UNIT)
INFINITY = tl.constexpr(INFINITY_BITS)
NAN = tl.constexpr(NAN_BITS)
LARGEST_INT = tl.constexpr(2**31 - 1)
SMALLEST = tl.constexpr(SMALLEST_ABSMAX)


@triton.jit
def scale_of(word, place):
    """The scale at a place, of a group's word."""
    return ((word & -65536) + place * ((word & 65535) * UNIT)).to(tl.float32, bitcast=True)


@triton.jit
def larger(one, other):
    """The larger of two numbers, a NaN if either is: a plain maximum is the one that is a number."""
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def block_absmax(magnitude):
    """The largest of each row of a tile [rows, lanes, vector], as [rows, 1, 1]."""
    largest = tl.reduce(tl.reduce(magnitude, 2, larger), 1, larger)
    return larger(largest, SMALLEST)[:, None, None]


@triton.jit
def encode_scales(scales, absmax, left, LANES: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Store the record of a group, whose absmax are [rows, 1, 1], and return its scales."""
    ROWS: tl.constexpr = absmax.shape[0]
    bits, row = absmax.to(tl.int32, bitcast=True), tl.arange(0, ROWS)[:, None, None]
    high = tl.max(tl.max(tl.max(tl.where(row * BLOCK < left, bits, 0), axis=2), axis=1), axis=0)
    low = tl.min(tl.min(tl.min(tl.where(row * BLOCK < left, bits, LARGEST_INT), axis=2), axis=1), axis=0) & -65536
    step = (high - low + (ALL_STEPS - 1)) // ALL_STEPS
    word = tl.where(high < INFINITY, low | step, NAN)
    size = (word & 65535) * UNIT
    place = (bits - low + size // 2).to(tl.uint32) // tl.maximum(size, 1).to(tl.uint32)
    place = tl.where((size > 0) & (row * BLOCK < left), place, 0).to(tl.int32)
    tl.store(scales.to(tl.pointer_type(tl.int32)), word)
    offsets = tile_offsets(ROWS, LANES, VECTOR, BLOCK)
    first = tl.arange(0, LANES)[None, :, None] == 0
    places = tl.broadcast_to(place.to(tl.uint8), (ROWS, LANES, 1))
    tl.store(scales + 4 + offsets // BLOCK, places, mask=first)
    return scale_of(word, place)


@triton.jit
def load_scales(scales, ROWS: tl.constexpr):
    """Load the scales of a group, [rows, 1, 1]."""
    word = tl.load(scales.to(tl.pointer_type(tl.int32)))
    return scale_of(word, tl.load(scales + 4 + tl.arange(0, ROWS)).to(tl.int32))[:, None, None]


@triton.jit
def encode_int8(scaled):
    """The signed byte nearest to a number, as an unsigned one."""
    return (tl.minimum(tl.maximum(scaled, -127.0), 127.0) + ROUNDING).to(tl.uint32, bitcast=True).to(tl.uint8)


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
    codes, values, offsets, SHIFT: tl.constexpr, left, scale, FOUR_BITS: tl.constexpr, VECTOR: tl.constexpr,
    ACCESS: tl.constexpr,
):  # fmt: skip
    """Decode and store one step of a tile."""
    mask = tile_mask(offsets, SHIFT, left, VECTOR, ACCESS)
    if FOUR_BITS:
        there = pair_mask(offsets, SHIFT, left, VECTOR, ACCESS)
        pair = load(pair_pointers(codes, offsets, SHIFT, VECTOR), there, ACCESS).to(tl.int32)
        level = tl.join(decode_nf4(pair >> 4), decode_nf4(pair))
        value = tl.reshape(level, (offsets.shape[0], offsets.shape[1], VECTOR)) * scale
    else:
        code = load(element_pointers(codes, offsets, SHIFT, VECTOR), mask, ACCESS)
        value = code.to(tl.int8, bitcast=True).to(tl.float32) * (scale * INVERSE_127)
    pointers = element_pointers(values, offsets, SHIFT, VECTOR)
    store(pointers, value.to(values.dtype.element_ty), mask, ACCESS)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["values", "codes", "scales"])
def quantize_resting_kernel(
    values, codes, scales, count: tl.int64,
    FOUR_BITS: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, STEPS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Encode one program's blocks, which are a group."""
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
        largest = larger(largest, tl.abs(x))
    scales += tl.program_id(0).to(tl.int64) * RECORD_BYTES
    scale = reciprocal(encode_scales(scales, block_absmax(largest), left, LANES, VECTOR, BLOCK))
    if not FOUR_BITS:
        scale = scale * 127.0
    for step in tl.static_range(STEPS):
        encode_step(values, codes, offsets, step * LANES * VECTOR, left, scale, FOUR_BITS, VECTOR, ACCESS)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["codes", "scales", "values"])
def dequantize_resting_kernel(
    codes, scales, values, count: tl.int64,
    FOUR_BITS: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, STEPS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Decode one program's blocks, which are a group."""
    TILE: tl.constexpr = ROWS * LANES * VECTOR * STEPS
    start = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(count - start, TILE).to(tl.int32)
    values = advance(values, start, ACCESS)
    codes = advance(codes, start // 2 if FOUR_BITS else start, ACCESS)
    offsets = tile_offsets(ROWS, LANES, VECTOR, BLOCK)
    scale = load_scales(scales + tl.program_id(0).to(tl.int64) * RECORD_BYTES, ROWS)
    for step in tl.static_range(STEPS):
        decode_step(codes, values, offsets, step * LANES * VECTOR, left, scale, FOUR_BITS, VECTOR, ACCESS)


def _access(values: Tensor, codes: Tensor) -> int:
    aligned = values.data_ptr() % ACCESS_BYTES == 0 and codes.data_ptr() % ACCESS_BYTES == 0
    return VECTOR if aligned and values.numel() % vector_of(values.dtype) == 0 else ELEMENT


def quantize_launch(values: Tensor, codes: Tensor, scales: Tensor, kind: str, warp: int = WARP) -> Launch:
    """Return the launch that encodes `values` into `codes` and `scales`, which begin at a multiple of 4 bytes."""
    return _launch(quantize_resting_kernel, values, codes, scales, kind, warp)


def dequantize_launch(codes: Tensor, scales: Tensor, values: Tensor, kind: str, warp: int = WARP) -> Launch:
    """Return the launch that decodes `codes` and `scales`, which begin at a multiple of 4 bytes, into `values`."""
    return _launch(dequantize_resting_kernel, values, codes, scales, kind, warp)


def _launch(
    kernel: triton.runtime.JITFunction, values: Tensor, codes: Tensor, scales: Tensor, kind: str, warp: int
) -> Launch:
    shape = tile_shape(BLOCK, vector_of(values.dtype), warp)
    assert shape.elements == GROUP
    constants = {"FOUR_BITS": kind == "nf4", "ACCESS": _access(values, codes), **shape.constants()}
    arguments: dict[str, Tensor | int] = {"values": values, "codes": codes, "scales": scales, "count": values.numel()}
    return Launch(kernel, arguments, constants, -(-values.numel() // shape.elements), shape.num_warps)


def quantize(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Encode `values` [n] on a GPU; the contract is the package's."""
    n = values.numel()
    codes = torch.empty(-(-n // 2) if kind == "nf4" else n, dtype=torch.uint8, device=values.device)
    scales = torch.empty(-(-n // GROUP) * RECORD, dtype=torch.uint8, device=values.device)
    if n:
        quantize_launch(values, codes, scales, kind, warp_size(values.device)).run()
    return codes, scales


def dequantize_(out: Tensor, codes: Tensor, scales: Tensor, kind: str) -> None:
    """Decode into `out` [n] on a GPU; the contract is the package's."""
    if out.numel():
        if scales.data_ptr() % 4:
            scales = scales.clone()
        dequantize_launch(codes, scales, out, kind, warp_size(out.device)).run()
