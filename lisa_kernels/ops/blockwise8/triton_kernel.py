"""The 8-bit codec in Triton, bit for bit what the reference defines."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lisa_kernels.ops.tiles import (
    ACCESS_BYTES,
    ELEMENT,
    LONGEST_VECTOR,
    VECTOR,
    WARP,
    Launch,
    tile_shape,
    vector_of,
    warp_size,
)
from lisa_kernels.ops.tiles.triton_kernel import (
    WHOLE_TILE,
    advance,
    element_offsets,
    element_pointers,
    load,
    load_floats,
    m_bits,
    random_state,
    random_words,
    store,
    tile_mask,
    tile_offsets,
    v_bits,
    word_pointers,
)

TOP = tl.constexpr(0.9375 - 4 * 2.0**-24)
INVERSE_TOP = tl.constexpr(1.0666669607162476)
SMALLEST_ABSMAX = tl.constexpr(2.0**-120)
SMALLEST_M = tl.constexpr(1.125 * 2.0**-16)
LARGEST = tl.constexpr(3.4028234663852886e38)
M_OFFSET = tl.constexpr(111 << 23)
# Added to the 20 random bits of a first moment, it makes them the mantissa of a float in [2¹⁸, 2¹⁸ + 2¹⁵), and the sum
# with the scaled value's bits, shifted, 2048 more than the code: a multiple of 256, which storing a byte drops.
M_BIAS = tl.constexpr(145 << 23)
M_BIASED_ONE = tl.constexpr(2048 + 1)
# Of a second moment twice the scaled value is encoded, which makes that difference 768, again a multiple of 256.
V_OFFSET = tl.constexpr(95 << 23)
V_BIASED_ZERO = tl.constexpr(768)
HALF = tl.constexpr(1 << 19)


@triton.jit
def reciprocal(x):
    """1 / x, correctly rounded, of x in [2**-120, inf]; without the branch and call of a division.

    The first line errs by five units in the last place at most, one Newton step makes that one, downwards, and the
    residuals, which a fused product has exactly, tell whether the number above is nearer.
    """
    r = tl.rsqrt(x)
    r = r * r
    r = tl.fma(tl.fma(-tl.minimum(x, LARGEST), r, 1.0), r, r)
    above = (r.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(tl.fma(-x, above, 1.0)) < tl.abs(tl.fma(-x, r, 1.0)), above, r)


@triton.jit
def decode_m(word, BYTE: tl.constexpr):
    """The first moment in one byte of 32-bit words, before its scale: a float32's sign, exponent and mantissa."""
    magnitude = word & (127 << (8 * BYTE))
    if BYTE == 3:
        bits = magnitude >> 4
    else:
        bits = magnitude << (20 - 8 * BYTE)
    sign = (word << (24 - 8 * BYTE)) & 0x80000000
    return (tl.where(magnitude == 0, 0, bits + M_OFFSET) | sign).to(tl.float32, bitcast=True)


@triton.jit
def decode_v(code, scale):
    """The second moment of an 8-bit code."""
    bits = (code.to(tl.uint32) << 20) + V_OFFSET
    return tl.where(code == 0, 0.0, bits.to(tl.float32, bitcast=True)) * scale


@triton.jit
def encode_m(x, scale, bits20):
    """The code of a first moment; `scale` maps the block's absmax to TOP, `bits20` rounds."""
    scaled = tl.abs(x) * scale
    biased = bits20 + M_BIAS
    code = tl.maximum((scaled.to(tl.uint32, bitcast=True) + biased) >> 20, M_BIASED_ONE)
    # The random bits times 2**-20 · SMALLEST_M, exactly.
    threshold = tl.fma(biased.to(tl.float32, bitcast=True), SMALLEST_M * 2.0**-15, -SMALLEST_M * 2.0**3)
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 128
    return (tl.where(scaled > threshold, code, 0) | sign).to(tl.uint8)


@triton.jit
def encode_v(x, twice_scale, bits20):
    """The code of a second moment, at least 1 where x is positive."""
    code = ((x * twice_scale).to(tl.uint32, bitcast=True) + bits20) >> 20
    smallest = tl.minimum(x.to(tl.int32, bitcast=True) + V_BIASED_ZERO, V_BIASED_ZERO + 1)
    return tl.maximum(code.to(tl.int32), smallest).to(tl.uint8)


@triton.jit
def block_absmax(magnitude):
    """The largest of each row of a tile [rows, lanes, vector], as [rows, 1, 1]."""
    largest = tl.max(tl.max(magnitude, axis=2), axis=1)
    return tl.maximum(largest, SMALLEST_ABSMAX)[:, None, None]


@triton.jit
def load_absmax(pointer, left, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACCESS: tl.constexpr):
    """Load the absmax of each row of a tile that exists, as [rows, 1, 1]."""
    row = tl.arange(0, ROWS)
    return load(pointer + row, row * BLOCK < left, ACCESS)[:, None, None]


@triton.jit
def store_absmax(
    pointer, absmax, left, LANES: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr, ACCESS: tl.constexpr
):
    """Store each row's absmax from its first lane: in the tile's own layout, where it lies already."""
    offsets = tile_offsets(absmax.shape[0], LANES, VECTOR, BLOCK)
    mask = tl.arange(0, LANES)[None, :, None] == 0
    if ACCESS != WHOLE_TILE:
        mask = mask & (offsets < left)
    tl.store(pointer + offsets // BLOCK, tl.broadcast_to(absmax, (absmax.shape[0], LANES, 1)), mask=mask)


@triton.jit
def load_m(pointer, offsets, SHIFT: tl.constexpr, mask, VECTOR: tl.constexpr, ACCESS: tl.constexpr):
    """Load and decode a step of first moments, before their scale."""
    if ACCESS == WHOLE_TILE:
        word = tl.load(word_pointers(pointer, offsets, SHIFT, VECTOR, 4))
        even = tl.join(decode_m(word, 0), decode_m(word, 2))
        odd = tl.join(decode_m(word, 1), decode_m(word, 3))
        moment = tl.reshape(tl.join(even, odd), (offsets.shape[0], offsets.shape[1], VECTOR))
    else:
        code = load(element_pointers(pointer, offsets, SHIFT, VECTOR), mask, ACCESS)
        moment = decode_m(code.to(tl.uint32), 0)
    return moment


@triton.jit
def load_v(pointer, offsets, SHIFT: tl.constexpr, mask, scale, VECTOR: tl.constexpr, ACCESS: tl.constexpr):
    """Load and decode a step of second moments."""
    return decode_v(load(element_pointers(pointer, offsets, SHIFT, VECTOR), mask, ACCESS), scale)


@triton.jit
def encode_step(
    values, codes, offsets, SHIFT: tl.constexpr, left, scale, state, first_element, SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr, VECTOR: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """Encode and store one step of a tile, `first_element` elements after the state's start."""
    mask = tile_mask(offsets, SHIFT, left, VECTOR, ACCESS)
    x = load_floats(values, offsets, SHIFT, mask, VECTOR, ACCESS)
    bits20 = tl.full([1, 1, 1], HALF, tl.uint32)
    if STOCHASTIC:
        words = random_words(state, element_offsets(offsets, SHIFT, VECTOR) + first_element)
        bits20 = m_bits(words) if SIGNED else v_bits(words)
    code = encode_m(x, scale, bits20) if SIGNED else encode_v(x, scale * 2, bits20)
    store(element_pointers(codes, offsets, SHIFT, VECTOR), code, mask, ACCESS)


@triton.jit
def decode_step(
    codes, values, offsets, SHIFT: tl.constexpr, left, scale, SIGNED: tl.constexpr, VECTOR: tl.constexpr,
    ACCESS: tl.constexpr,
):  # fmt: skip
    """Decode and store one step of a tile."""
    mask = tile_mask(offsets, SHIFT, left, VECTOR, ACCESS)
    if SIGNED:
        x = load_m(codes, offsets, SHIFT, mask, VECTOR, ACCESS) * scale
    else:
        x = load_v(codes, offsets, SHIFT, mask, scale, VECTOR, ACCESS)
    store(element_pointers(values, offsets, SHIFT, VECTOR), x, mask, ACCESS)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["values", "codes", "absmax", "key"])
def quantize_kernel(
    values, codes, absmax, key, count: tl.int64,
    SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, STEPS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Encode one program's blocks; a block larger than a tile is read twice. Without `STOCHASTIC` no key is read."""
    TILE: tl.constexpr = ROWS * LANES * VECTOR * STEPS
    start = tl.program_id(0).to(tl.int64) * (TILE * PASSES)
    left = tl.minimum(count - start, TILE * PASSES).to(tl.int32)
    values = advance(values, start, ACCESS)
    codes = advance(codes, start, ACCESS)
    offsets = tile_offsets(ROWS, LANES, VECTOR, BLOCK)
    largest = tl.zeros([ROWS, LANES, VECTOR], tl.float32)
    for tile in range(PASSES):
        for step in tl.static_range(STEPS):
            mask = tile_mask(offsets, step * LANES * VECTOR, left - tile * TILE, VECTOR, ACCESS)
            x = load_floats(values + tile * TILE, offsets, step * LANES * VECTOR, mask, VECTOR, ACCESS)
            largest = tl.maximum(largest, tl.abs(x))
    largest = block_absmax(largest)
    store_absmax(absmax + start // BLOCK, largest, left, LANES, VECTOR, BLOCK, ACCESS)
    scale = reciprocal(largest) * TOP
    state = random_state(tl.load(key), start) if STOCHASTIC else 0
    for tile in range(PASSES):
        for step in tl.static_range(STEPS):
            encode_step(
                values + tile * TILE, codes + tile * TILE, offsets, step * LANES * VECTOR, left - tile * TILE, scale,
                state, tile * TILE, SIGNED, STOCHASTIC, VECTOR, ACCESS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["codes", "absmax", "values"])
def dequantize_kernel(
    codes, absmax, values, count: tl.int64,
    SIGNED: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, STEPS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Decode one program's blocks."""
    TILE: tl.constexpr = ROWS * LANES * VECTOR * STEPS
    start = tl.program_id(0).to(tl.int64) * (TILE * PASSES)
    left = tl.minimum(count - start, TILE * PASSES).to(tl.int32)
    values = advance(values, start, ACCESS)
    codes = advance(codes, start, ACCESS)
    offsets = tile_offsets(ROWS, LANES, VECTOR, BLOCK)
    scale = load_absmax(absmax + start // BLOCK, left, ROWS, BLOCK, ACCESS) * INVERSE_TOP
    for tile in range(PASSES):
        for step in tl.static_range(STEPS):
            decode_step(
                codes + tile * TILE, values + tile * TILE, offsets, step * LANES * VECTOR, left - tile * TILE, scale,
                SIGNED, VECTOR, ACCESS,
            )  # fmt: skip


def _access(*tensors: Tensor) -> int:
    aligned = all(tensor.data_ptr() % ACCESS_BYTES == 0 for tensor in tensors)
    return VECTOR if aligned and tensors[0].numel() % LONGEST_VECTOR == 0 else ELEMENT


def quantize_launch(
    values: Tensor, codes: Tensor, absmax: Tensor, signed: bool, block_size: int, key: Tensor | None, warp: int = WARP
) -> Launch:
    """Return the launch that encodes `values` into `codes` and `absmax`."""
    shape = tile_shape(block_size, vector_of(values.dtype), warp)
    # Without a key the pointer is not read; it must only have the right type.
    arguments = {"values": values, "codes": codes, "absmax": absmax, "key": codes if key is None else key}
    constants = {"SIGNED": signed, "STOCHASTIC": key is not None, "ACCESS": _access(values, codes), **shape.constants()}
    programs = -(-values.numel() // shape.elements)
    return Launch(quantize_kernel, {**arguments, "count": values.numel()}, constants, programs, shape.num_warps)


def dequantize_launch(
    codes: Tensor, absmax: Tensor, values: Tensor, signed: bool, block_size: int, warp: int = WARP
) -> Launch:
    """Return the launch that decodes `codes` and `absmax` into `values`."""
    shape = tile_shape(block_size, vector_of(values.dtype), warp)
    arguments = {"codes": codes, "absmax": absmax, "values": values, "count": codes.numel()}
    constants = {"SIGNED": signed, "ACCESS": _access(values, codes), **shape.constants()}
    return Launch(dequantize_kernel, arguments, constants, -(-codes.numel() // shape.elements), shape.num_warps)


def quantize(values: Tensor, signed: bool, block_size: int, key: Tensor | None) -> tuple[Tensor, Tensor]:
    """Encode float32 `values` [n] on a GPU; the contract is the package's."""
    codes = torch.empty_like(values, dtype=torch.uint8)
    absmax = values.new_empty((-(-values.numel() // block_size),))
    if values.numel():
        quantize_launch(values, codes, absmax, signed, block_size, key, warp_size(values.device)).run()
    return codes, absmax


def dequantize(codes: Tensor, absmax: Tensor, signed: bool, block_size: int) -> Tensor:
    """Decode `codes` [n] on a GPU; the contract is the package's."""
    values = torch.empty_like(codes, dtype=torch.float32)
    if codes.numel():
        dequantize_launch(codes, absmax, values, signed, block_size, warp_size(codes.device)).run()
    return values
