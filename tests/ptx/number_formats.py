"""Number formats that NumPy lacks, exact fused multiply-add, and errors of approximate instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SMALLEST_NORMAL = np.float32(2.0**-126)


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bfloat16 bits (uint16) exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to the nearest bfloat16, ties to even, and return its bits; every NaN becomes 0x7FFF."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # The carry out of the mantissa is what rounds up into the exponent; only NaN could carry out of 32 bits.
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.where(np.isnan(values), np.uint16(0x7FFF), (rounded >> np.uint32(16)).astype(np.uint16))


def float32_to_tf32(bits: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Round float32 bits to the nearest of 10 mantissa bits, ties away from zero."""
    return (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def flush_subnormals(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Replace subnormal float32 values by zeros of their sign."""
    small = np.abs(values) < SMALLEST_NORMAL
    return np.where(small, np.copysign(np.float32(0), values), values) if small.any() else values


def _to_odd(rounded: Array, error: Array) -> Array:
    """Turn rounding to nearest into rounding to odd, after which a second rounding to nearest is exact."""
    bits = rounded.view(f"u{rounded.dtype.itemsize}")
    fix = (error != 0) & np.isfinite(rounded) & ((bits & bits.dtype.type(1)) == 0)
    toward = np.where(error > 0, np.inf, -np.inf).astype(rounded.dtype)
    return np.where(fix, np.nextafter(rounded, toward), rounded)


def _two_sum(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Return a·b + c rounded once, for float16, float32 and float64 arrays of one dtype."""
    if a.dtype == np.float64:
        return _fused_float64(a, b, c)
    # A product of two float32 is exact in float64.
    total, error = _two_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
    return _to_odd(total, error).astype(a.dtype)


def fused_multiply_add_bfloat16(
    a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return a·b + c of bfloat16 values held in float32, such that rounding it to bfloat16 is the only rounding."""
    total, error = _two_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
    wide = _to_odd(total, error)
    narrow = wide.astype(np.float32)
    return _to_odd(narrow, wide - narrow.astype(np.float64))


def _fused_float64(a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boldo and Melquiond's algorithm: exact unless an intermediate overflows or underflows."""
    high, low = _two_product(a, b)
    middle, rest = _two_sum(c, low)
    total, error = _two_sum(high, middle)
    fused = total + _to_odd(*_two_sum(rest, error))
    return np.where(np.isfinite(fused), fused, a * b + c)


def _two_product(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(a: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    shifted = a * np.float64(2.0**27 + 1)
    high = shifted - (shifted - a)
    return high, a - high


def multiply_high(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the upper 64 bits of the 128-bit products of unsigned integers."""
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    a_low, a_high, b_low, b_high = a & low32, a >> shift, b & low32, b >> shift
    middle = a_high * b_low + ((a_low * b_low) >> shift)
    other = a_low * b_high + (middle & low32)
    return a_high * b_high + (middle >> shift) + (other >> shift)


# The largest absolute error of each approximate float32 instruction, given the exact result; from the PTX ISA.
ErrorBound = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def units_in_the_last_place(count: float) -> ErrorBound:
    """Return the bound of an instruction that errs by up to `count` units in the last place of float32."""

    def bound(exact: NDArray[np.float64]) -> NDArray[np.float64]:
        exponent = np.frexp(np.where(np.isfinite(exact), exact, 1.0))[1]
        return np.ldexp(np.float64(count), np.maximum(exponent - 24, -149))

    return bound


def relative_error(bound: float) -> ErrorBound:
    """Return the bound of an instruction that errs by a share of the result."""
    return lambda exact: np.abs(exact) * bound


def absolute_or_relative_error(bound: float) -> ErrorBound:
    """Return the bound of an instruction that errs by at most `bound`, or that share of a result above 1."""
    return lambda exact: np.maximum(np.abs(exact), 1.0) * bound


APPROXIMATE_ERROR: dict[str, ErrorBound] = {
    "div.full": units_in_the_last_place(2),
    "div.approx": units_in_the_last_place(2),
    "rcp.approx": units_in_the_last_place(1),
    "sqrt.approx": relative_error(2.0**-23),
    "rsqrt.approx": relative_error(2.0**-22.9),
    "ex2.approx": units_in_the_last_place(2),
    "lg2.approx": absolute_or_relative_error(2.0**-22.6),
    "sin.approx": absolute_or_relative_error(2.0**-20.5),
    "cos.approx": absolute_or_relative_error(2.0**-20.5),
    "tanh.approx": relative_error(2.0**-11),
}


def perturbed(exact: NDArray[np.float64], bound: ErrorBound, noise: np.random.Generator) -> NDArray[np.float32]:
    """Return float32 results drawn evenly from what an instruction with this error bound may give."""
    rounded = exact.astype(np.float32)
    limit = bound(exact)
    drawn = (exact + noise.uniform(-1, 1, exact.shape) * limit).astype(np.float32)
    allowed = np.isfinite(rounded) & (rounded != 0) & (np.abs(drawn.astype(np.float64) - exact) <= limit)
    return np.where(allowed, drawn, rounded)
