"""The bootstrap: intervals as wide as they are to be, differences in pairs."""

from __future__ import annotations

import math

import pytest
import torch

from lisa_kernels.evaluate.intervals import Ratio, difference_interval, interval


def test_an_interval_of_a_share_is_the_normal_one() -> None:
    """Of 400 rows of which 100 are right: 0.25 ± 1.96 · sqrt(0.25 · 0.75 / 400)."""
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    low, high = interval(Ratio([1.0] * 100 + [0.0] * 300, [1.0] * 400))
    assert (low, high) == (pytest.approx(0.25 - half, abs=3e-3), pytest.approx(0.25 + half, abs=3e-3))


def test_rows_count_by_their_length() -> None:
    """A loss is that of all tokens, so that its interval is no mean of rows' means."""
    ratio = Ratio([2.0, 8.0], [1.0, 8.0])
    assert ratio.value == pytest.approx(10 / 9)
    assert interval(ratio) == (pytest.approx(1.0), pytest.approx(2.0))


def test_a_difference_is_taken_row_by_row() -> None:
    """What both models find hard does not widen it."""
    hard = torch.rand(200, generator=torch.Generator().manual_seed(1)).tolist()
    first, second = Ratio(hard, [1.0] * 200), Ratio([value - 0.1 for value in hard], [1.0] * 200)
    assert difference_interval(first, second) == (pytest.approx(-0.1), pytest.approx(-0.1))
    low, high = interval(first)
    assert high - low > 0.05


def test_the_same_rows_give_the_same_interval() -> None:
    ratio = Ratio([0.0, 1.0, 1.0], [1.0] * 3)
    assert interval(ratio) == interval(ratio)
