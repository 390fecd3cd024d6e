"""Formats and fused multiply-add against exact rational arithmetic and torch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .number_formats import (
    APPROXIMATE_ERROR,
    bfloat16_to_float32,
    float32_to_bfloat16,
    flush_subnormals,
    fused_multiply_add,
    fused_multiply_add_bfloat16,
    multiply_high,
    perturbed,
)

FLOAT32 = st.floats(-(2.0**60), 2.0**60, width=32)
FLOAT64 = st.floats(-(2.0**200), 2.0**200).filter(lambda x: x == 0 or abs(x) > 2.0**-200)


def test_bfloat16_rounds_as_torch_does() -> None:
    """All exponents, ties and specials give torch's bits, and widen back exactly."""
    bits = np.arange(0, 2**32, 65537 // 3, dtype=np.uint64).astype(np.uint32)
    values = np.concatenate([bits.view(np.float32), np.float32([0.0, -0.0, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8])])
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).bfloat16()
    rounded = float32_to_bfloat16(values)
    np.testing.assert_array_equal(rounded.view(np.int16), expected.view(torch.int16).numpy())
    np.testing.assert_array_equal(bfloat16_to_float32(rounded), expected.float().numpy())
    assert float32_to_bfloat16(np.float32([np.nan]))[0] == 0x7FFF


def nearest_float32(exact: Fraction) -> np.float32:
    """Return the float32 nearest to a rational, ties to even, by trying the neighbours of a first guess."""
    guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))


@settings(deadline=None, derandomize=True, database=None)
@given(FLOAT32, FLOAT32, FLOAT32)
def test_fused_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    """a·b + c in float32 is the float32 nearest to the exact value."""
    fused = fused_multiply_add(*(np.float32([x]) for x in (a, b, c)))[0]
    assert fused == nearest_float32(Fraction(a) * Fraction(b) + Fraction(c))


def test_fused_multiply_add_is_not_two_roundings() -> None:
    """A case where product and sum rounded one after the other give another number."""
    a, b, c = (np.float32([x]) for x in (1 + 2**-12, 1 + 2**-12, -1))
    assert fused_multiply_add(a, b, c)[0] != a[0] * b[0] + c[0]


@settings(deadline=None, derandomize=True, database=None)
@given(FLOAT64, FLOAT64, FLOAT64)
def test_fused_multiply_add_of_float64_rounds_once(a: float, b: float, c: float) -> None:
    """Python's own conversion of a rational to a float is correctly rounded."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact != 0 and abs(exact) > Fraction(2) ** -500:
        assert fused_multiply_add(*(np.float64([x]) for x in (a, b, c)))[0] == float(exact)


def test_fused_multiply_add_of_bfloat16_is_rounded_once() -> None:
    """A sum just above a tie of bfloat16 rounds up, though float32 would first round it onto the tie."""
    a, b = np.float32([1 + 2**-7]), np.float32([1.0])
    tiny = np.float32([2.0**-8 + 2.0**-15])
    rounded = float32_to_bfloat16(fused_multiply_add_bfloat16(a, b, tiny))
    assert bfloat16_to_float32(rounded)[0] == 1 + 2**-6
    above_tie = fused_multiply_add_bfloat16(np.float32([1.0]), np.float32([1 + 2**-8]), np.float32([2.0**-40]))
    assert bfloat16_to_float32(float32_to_bfloat16(above_tie))[0] == 1 + 2**-7


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_upper_half_of_a_product(a: int, b: int) -> None:
    """The upper 64 bits equal Python's whole product, shifted."""
    assert int(multiply_high(np.array([a], np.uint64), np.array([b], np.uint64))[0]) == a * b >> 64


def test_subnormals_flush_to_zeros_of_their_sign() -> None:
    """Only values below the smallest normal number change."""
    values = np.float32([1e-39, -1e-39, 2.0**-126, 0.0, 1.0, np.inf])
    flushed = flush_subnormals(values)
    np.testing.assert_array_equal(flushed, np.float32([0, -0.0, 2.0**-126, 0, 1, np.inf]))
    assert np.signbit(flushed[1])


@pytest.mark.parametrize("name", sorted(APPROXIMATE_ERROR))
def test_errors_stay_within_the_documented_bound_and_use_it(name: str) -> None:
    """Drawn results differ from the rounded ones, in both directions, and never leave the bound."""
    exact = np.geomspace(2.0**-20, 2.0**20, 20_000)
    bound = APPROXIMATE_ERROR[name]
    drawn = perturbed(exact, bound, np.random.default_rng(0)).astype(np.float64)
    assert (np.abs(drawn - exact) <= bound(exact)).all()
    rounded = exact.astype(np.float32)
    assert (drawn > rounded).mean() > 0.1
    assert (drawn < rounded).mean() > 0.1
    special = np.array([0.0, np.inf, -np.inf])
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(perturbed(special, bound, np.random.default_rng(0)), special)
