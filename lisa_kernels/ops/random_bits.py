"""Counter-based random words: a function of (seed, step, parameter, element) and of nothing else.

One hash of 32 bits for every four elements, a bijection of its input, and of it a word for each of the four:

    key    = mix64(mix64(seed) + parameter * GOLDEN + step * STEP)                    once per parameter and step
    base   = mix32(low(key) + high(element) * GOLDEN32) xor high(key)                 once per 2**32 elements
    hash   = mix32((low(element) >> 2) xor base)                                      once per four elements
    word   = hash * FACTOR ** (element mod 4)

The top 20 bits of the word round the first moment, its low 20 bits the second moment, and the top 16 bits of
word * FACTOR ** 4 a 16-bit weight. Any two words, and weights' numbers, of four elements are equidistributed together
in their leading bits, and two words in their low 20 bits too: FACTOR was searched so that the lattices of its powers,
modulo 2**32 (spectral figure at least 0.84 of the best possible) and modulo 2**20, have no short vectors. The eight
bits that an element's two moments share are the last that matter to the first moment and the first to the second, and
so tie the two together in one of 4,096 cases only. Every kernel computes the same integers, so results depend neither
on block or grid shape nor on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
_STEP = 0xD1B54A32D192ED03
_GOLDEN32 = 0x9E3779B9
_FACTOR = 0xD9CECE9F


def _signed64(value: int) -> int:
    """Return the two's complement reading of 64 bits, which is what torch's int64 holds."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix64_int(value: int) -> int:
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift int64 right as if it were unsigned."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(value: Tensor) -> Tensor:
    value = (value ^ _shift_right(value, 30)) * _signed64(0xBF58476D1CE4E5B9)
    value = (value ^ _shift_right(value, 27)) * _signed64(0x94D049BB133111EB)
    return value ^ _shift_right(value, 31)


def _mix32(value: Tensor) -> Tensor:
    """Hash int64 values that hold 32 bits to 32 bits."""
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK32
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _MASK32
    return value ^ (value >> 16)


def _factor_to(exponent: int) -> int:
    return pow(_FACTOR, exponent, 1 << 32)


def key_base(seed: int, parameter: int) -> int:
    """Return the part of a parameter's keys that does not change from step to step, as a signed 64-bit number."""
    return _signed64(_mix64_int(_mix64_int(seed) + parameter * _GOLDEN))


def keys_at(bases: Tensor, step: Tensor) -> Tensor:
    """Return the int64 keys [k] of parameters with these bases (int64 [k]) at a step (int64 0-d), never read here."""
    return _mix64(step.to(torch.int64) * _signed64(_STEP) + bases)


def random_key(seed: int, parameter: int, step: Tensor) -> Tensor:
    """Return the int64 0-d key of one parameter at one step; `step` is an int64 0-d tensor, never read on the host."""
    return _mix64(step.to(torch.int64) * _signed64(_STEP) + key_base(seed, parameter))


def number_key(seed: int, parameter: int, step: int) -> int:
    """Return the key of one parameter at one step as a number of the host, what `random_key` holds."""
    return _signed64(_mix64_int(step * _STEP + key_base(seed, parameter)))


def random_words(key: Tensor, start: int, count: int) -> Tensor:
    """Return int64 [count], 32 random bits for each of the elements start … start + count − 1."""
    element = torch.arange(start, start + count, dtype=torch.int64, device=key.device)
    base = _mix32(((key & _MASK32) + (element >> 32) * _GOLDEN32) & _MASK32) ^ _shift_right(key, 32)
    hashes = _mix32(((element & _MASK32) >> 2) ^ base)
    once, twice = torch.where(element & 1 > 0, _FACTOR, 1), torch.where(element & 2 > 0, _factor_to(2), 1)
    return (((hashes * once) & _MASK32) * twice) & _MASK32


def _mix32_(value: Tensor) -> Tensor:
    """Hash int32 values in place, as `_mix32` does: products keep their low 32 bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
        value.bitwise_xor_((value >> shift).bitwise_and_(0xFFFFFFFF >> shift)).mul_(factor)
    return value.bitwise_xor_((value >> 16).bitwise_and_(0xFFFF))


def random_floats(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Return float32 [count] of mean 0 and variance 1 for the elements start … start + count − 1 of a `number_key`.

    Each is a sum of two uniform numbers of 16 bits, exact but for one rounding: the same bits on every device, made
    there. Bytes meanwhile: 8 per number.
    """
    low, high = (part - (1 << 32) if part >> 31 else part for part in (key & _MASK32, key >> 32 & _MASK32))
    words = torch.arange(start, start + count, dtype=torch.int32, device=device)
    words = _mix32_(_mix32_(words.bitwise_xor_(low)).bitwise_xor_(high))
    sums = (words >> 16).bitwise_and_(0xFFFF).add_(words.bitwise_and_(0xFFFF)).sub_(0xFFFF)
    return sums.to(torch.float32).mul_((6.0 / _MASK32) ** 0.5)


def round_to_bfloat16(value: Tensor, bits16: Tensor) -> Tensor:
    """Round finite float32 to bfloat16 up or down, with odds that make the mean exact; bits16: int in [0, 2**16)."""
    raw = value.contiguous().view(torch.int32) + bits16.to(torch.int32)
    return (raw & -65536).view(torch.float32).to(torch.bfloat16)


def round_to_float16(value: Tensor, bits16: Tensor) -> Tensor:
    """Round finite float32 to float16 as `round_to_bfloat16` does, by the upper 13 of the 16 bits.

    Below 2⁻¹⁴ float16's places are 2⁻²⁴ apart, as those of the 13 bits are from 2⁻¹⁴ to 2⁻¹³: there 2⁻¹⁴ is added
    meanwhile, which itself rounds by less than a thousandth of such a place.
    """
    magnitude = value.abs()
    offset = torch.where(magnitude < 2.0**-14, 2.0**-14, 0.0)
    raw = (magnitude + offset).view(torch.int32) + (bits16.to(torch.int32) >> 3)
    return torch.copysign((raw & -8192).view(torch.float32) - offset, value).to(torch.float16)


# How float32 becomes each narrower dtype of weights.
STOCHASTIC_ROUNDINGS = {torch.bfloat16: round_to_bfloat16, torch.float16: round_to_float16}


def moment_bits(words: Tensor, signed: bool) -> Tensor:
    """Return the 20 bits of random words that round first (`signed`) or second moments."""
    return words >> 12 if signed else words & 0xFFFFF


def weight_bits(words: Tensor) -> Tensor:
    """Return the 16 bits of random words that round 16-bit weights."""
    return ((words * _factor_to(4)) & _MASK32) >> 16
