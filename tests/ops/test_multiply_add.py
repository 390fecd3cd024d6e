"""The definition's fused multiply-add is exact to the last bit, also where float64 alone would round twice."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from lisa_kernels.ops.adamw8.reference import multiply_add

ULP = 2.0**-23
# a · b is a hair from the middle of two float32 that c is beside; a sum in float64 lands on the middle itself.
NEAR_TIES = [
    (sign * 2.0**-24 * (1 + ULP), 1 - ULP, sign * (1 + ULP)) for sign in (1, -1)
] + [(sign * 2.0**-24 * (1 + ULP), 1 + 3 * ULP, sign * 1.0) for sign in (1, -1)]  # fmt: skip
SPECIAL = [
    0.0, -0.0, 1.0, -1.0, 1 + ULP, 2.0**-149, -(2.0**-149), 2.0**-126, 2.0**-75, 3 * 2.0**-75, 1e16, -1e30, 3.4e38
]  # fmt: skip


def nearest(exact: Fraction) -> float:
    """Return the float32 nearest to a number, ties to even, from neighbours of a first guess."""
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    finite = [value for value in around if np.isfinite(value)]
    best = min(abs(Fraction(float(value)) - exact) for value in finite)
    ties = [value for value in finite if abs(Fraction(float(value)) - exact) == best]
    return float(next((value for value in ties if value.view(np.int32) % 2 == 0), ties[0]))


def fused(cases: list[tuple[float, float, float]]) -> Tensor:
    return multiply_add(*torch.tensor(cases, dtype=torch.float64).to(torch.float32).unbind(1))


def exactly(cases: list[tuple[float, float, float]]) -> list[float]:
    rounded = [[Fraction(float(np.float32(value))) for value in case] for case in cases]
    return [nearest(a * b + c) for a, b, c in rounded]


def test_sums_near_the_middle_of_two_floats_are_rounded_once() -> None:
    a, b, c = torch.tensor(NEAR_TIES, dtype=torch.float64).unbind(1)
    assert fused(NEAR_TIES).tolist() == exactly(NEAR_TIES)
    # The control: float64's own sum is wrong for two of them.
    assert ((a * b + c).to(torch.float32) != fused(NEAR_TIES)).sum() == 2


@pytest.mark.parametrize("spread", [0, 10, 60], ids=str)
def test_random_numbers_of_all_scales(spread: int) -> None:
    generator = np.random.default_rng(spread)
    numbers = generator.standard_normal((2000, 3)) * 2.0 ** generator.integers(-spread, spread + 1, (2000, 3))
    cases = [tuple(float(value) for value in row) for row in numbers.astype(np.float32)]
    assert fused(cases).tolist() == exactly(cases)  # type: ignore[arg-type]


def test_zeros_subnormals_and_large_numbers() -> None:
    cases = [case for case in itertools.product(SPECIAL, repeat=3) if abs(case[0] * case[1] + case[2]) < 3.4e38]
    assert len(cases) > 1000
    assert fused(cases).tolist() == exactly(cases)
