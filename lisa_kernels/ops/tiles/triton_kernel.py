"""What all kernels share in Triton: places, masks, loads and stores, random words of elements, products of matrices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lisa_kernels.ops.tiles import ELEMENT, WHOLE

WHOLE_TILE = tl.constexpr(WHOLE)
ELEMENT_TILE = tl.constexpr(ELEMENT)
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def tile_offsets(ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """The first element of each vector of a tile's first step, [rows, lanes, 1]."""
    return tl.arange(0, ROWS)[:, None, None] * BLOCK + tl.arange(0, LANES)[None, :, None] * VECTOR


@triton.jit
def work_item(work):
    """The table row and the tile of this program, int64 both."""
    item = tl.load(work + tl.program_id(0))
    return item >> 32, item & 0xFFFFFFFF


@triton.jit
def load(pointers, mask, ACCESS: tl.constexpr):
    """Load a tile; zeros where it ends."""
    if ACCESS == WHOLE_TILE:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=mask, other=0)
    return values


@triton.jit
def store(pointers, values, mask, ACCESS: tl.constexpr):
    """Store a tile up to where it ends."""
    if ACCESS == WHOLE_TILE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=mask)


@triton.jit
def tile_mask(offsets, SHIFT: tl.constexpr, left, VECTOR: tl.constexpr, ACCESS: tl.constexpr):
    """Which elements of a step exist, of `left`: one answer per vector where a count is a multiple of it."""
    if ACCESS == ELEMENT_TILE:
        mask = offsets + (SHIFT + tl.arange(0, VECTOR)[None, None, :]) < left
    else:
        mask = offsets + SHIFT < left
    return mask


@triton.jit
def advance(pointer, start, ACCESS: tl.constexpr):
    """A pointer's element `start`; its address is a multiple of 16 unless tiles are reached element by element."""
    pointer += start
    if ACCESS != ELEMENT_TILE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def whole_vectors(count, ACCESS: tl.constexpr):
    """A count, known to be a multiple of 8 unless tiles are reached element by element."""
    if ACCESS != ELEMENT_TILE:
        count = count // 8 * 8
    return count


@triton.jit
def element_offsets(offsets, SHIFT: tl.constexpr, VECTOR: tl.constexpr):
    """Places of each element of a step in the tile."""
    return offsets + tl.arange(0, VECTOR)[None, None, :] + SHIFT


@triton.jit
def element_pointers(pointer, offsets, SHIFT: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to each element of a step; what is the same in all steps comes first, so that it is computed once."""
    return pointer + offsets + tl.arange(0, VECTOR)[None, None, :] + SHIFT


@triton.jit
def word_pointers(pointer, offsets, SHIFT: tl.constexpr, VECTOR: tl.constexpr, PER_WORD: tl.constexpr):
    """Pointers to the 32-bit words of a step, each of which holds `PER_WORD` elements."""
    words = pointer.to(tl.pointer_type(tl.uint32)) + offsets // PER_WORD
    return words + tl.arange(0, VECTOR // PER_WORD)[None, None, :] + SHIFT // PER_WORD


@triton.jit
def load_floats(pointer, offsets, SHIFT: tl.constexpr, mask, VECTOR: tl.constexpr, ACCESS: tl.constexpr):
    """Load a step of any float dtype as float32; 16-bit ones of a whole tile in pairs, unpacked from 32-bit words."""
    if ACCESS == WHOLE_TILE and pointer.dtype.element_ty.primitive_bitwidth == 16:
        pairs = tl.load(word_pointers(pointer, offsets, SHIFT, VECTOR, 2))
        if pointer.dtype.element_ty == tl.bfloat16:
            low = (pairs << 16).to(tl.float32, bitcast=True)
            high = (pairs & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            low = pairs.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (pairs >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        values = tl.reshape(tl.join(low, high), (offsets.shape[0], offsets.shape[1], VECTOR))
    else:
        values = load(element_pointers(pointer, offsets, SHIFT, VECTOR), mask, ACCESS).to(tl.float32)
    return values


@triton.jit
def rounded_by(values, bits16, narrow: tl.constexpr):
    """Float32 as bfloat16 or float16, rounded up or down by 16 random bits."""
    bits = values.to(tl.uint32, bitcast=True)
    if narrow == tl.bfloat16:
        rounded = ((bits + bits16) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        # Where float16 is subnormal its places are as far apart as those of 13 bits from 2⁻¹⁴ on.
        magnitude = tl.abs(values)
        offset = tl.where(magnitude < 0.00006103515625, 0.00006103515625, 0.0)
        kept = ((magnitude + offset).to(tl.uint32, bitcast=True) + (bits16 >> 3)) & 0xFFFFE000
        nearer = (kept.to(tl.float32, bitcast=True) - offset).to(tl.uint32, bitcast=True)
        rounded = (nearer | (bits & 0x80000000)).to(tl.float32, bitcast=True).to(tl.float16)
    return rounded


@triton.jit
def store_floats(pointers, values, bits16, mask, STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr):
    """Store float32 in the pointers' dtype: one of 16 bits rounded by random ones if `STOCHASTIC`, else to nearest."""
    if STOCHASTIC and pointers.dtype.element_ty.primitive_bitwidth == 16:
        store(pointers, rounded_by(values, bits16, pointers.dtype.element_ty), mask, ACCESS)
    else:
        store(pointers, values.to(pointers.dtype.element_ty), mask, ACCESS)


# What makes four elements' hash a word for each of them, and its square.
FACTOR = tl.constexpr(0xD9CECE9F)
FACTOR_SQUARED = tl.constexpr(0xD9CECE9F**2 & 0xFFFFFFFF)
WEIGHT_FACTOR = tl.constexpr(0xD9CECE9F**4 & 0xFFFFFFFF)


@triton.jit
def mix32_after_first_shift(x):
    """The rest of mix32, given its input xor that shifted by 16."""
    x = x * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def mix32(x):
    """Hash 32 bits to 32 bits."""
    return mix32_after_first_shift(x ^ (x >> 16))


@triton.jit
def words_of(hashes, element):
    """The random words of elements from the hashes of their fours; where places are constants, so are the powers."""
    once = tl.where((element & 1) != 0, FACTOR, 1).to(tl.uint32)
    twice = tl.where((element & 2) != 0, FACTOR_SQUARED, 1).to(tl.uint32)
    return hashes * (once * twice)


@triton.jit
def random_state(key, start):
    """What the words of up to 2**16 elements from `start` (int64, a multiple of their number) have in common."""
    low = key.to(tl.uint32) + (start >> 32).to(tl.uint32) * 0x9E3779B9
    x = (start.to(tl.uint32) >> 2) ^ mix32(low) ^ (key >> 32).to(tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def random_words(state, index):
    """The random words of the elements `index` (below 2**16) after the state's start."""
    index = index.to(tl.uint32)
    return words_of(mix32_after_first_shift(state ^ (index >> 2)), index)


@triton.jit
def random_words_at(key, start, offsets, FAR: tl.constexpr):
    """The random words of the elements `start` (int64) + `offsets` (int32); FAR: some lie beyond 2**32."""
    low = key.to(tl.uint32)
    if FAR:
        low += ((start + offsets) >> 32).to(tl.uint32) * 0x9E3779B9
    element = start.to(tl.uint32) + offsets.to(tl.uint32)
    return words_of(mix32((element >> 2) ^ mix32(low) ^ (key >> 32).to(tl.uint32)), element)


@triton.jit
def m_bits(words):
    """The 20 bits of random words that round first moments."""
    return words >> 12


@triton.jit
def v_bits(words):
    """The 20 bits of random words that round second moments."""
    return words & 0xFFFFF


@triton.jit
def weight_bits(words):
    """The 16 bits of random words that round 16-bit weights."""
    return (words * WEIGHT_FACTOR) >> 16


@triton.jit
def halves(values):
    """Two bfloat16 tiles whose sum is a float32 tile to 2⁻¹⁷ of each value, and a float16 one exactly."""
    values = values.to(tl.float32)
    high = values.to(tl.bfloat16)
    return high, (values - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def add_product(left, right, total):
    """`total` + left · right, in float32, for tiles of any float dtypes.

    Two tiles of one 16-bit dtype are multiplied exactly. Else what is not bfloat16 is taken as a sum of bfloat16 parts,
    and products of the smallest parts are left out: 2⁻¹⁶ of |left| · |right|, or 2⁻²³ where both are float32. Sums of k
    terms err by up to k · 2⁻²³ besides.
    """
    if left.dtype == tl.float32 and right.dtype == tl.float32:
        left_high, left_rest = halves(left)
        right_high, right_rest = halves(right)
        left_low = (left - left_high.to(tl.float32) - left_rest.to(tl.float32)).to(tl.bfloat16)
        right_low = (right - right_high.to(tl.float32) - right_rest.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(left_high, right_low, tl.dot(left_low, right_high, tl.dot(left_rest, right_rest, total)))
        total = tl.dot(left_high, right_rest, tl.dot(left_rest, right_high, total))
        total = tl.dot(left_high, right_high, total)
    elif left.dtype == right.dtype:
        total = tl.dot(left, right, total)
    elif right.dtype == tl.bfloat16:
        high, low = halves(left)
        total = tl.dot(high, right, tl.dot(low, right, total))
    elif left.dtype == tl.bfloat16:
        high, low = halves(right)
        total = tl.dot(left, high, tl.dot(left, low, total))
    else:
        left_high, left_low = halves(left)
        right_high, right_low = halves(right)
        total = tl.dot(left_high, right_low, tl.dot(left_low, right_high, total))
        total = tl.dot(left_high, right_high, total)
    return total
