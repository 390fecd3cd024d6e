"""Figures as they are written."""

from __future__ import annotations

import pytest

from lisa_kernels.report.numbers import bytes_text, duration, loss, number, percent, ticks


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "0.0123"), (12.34, "12.3"), (1234.5, "1,234"), (1.5e-5, "1.5e-5"), (2e-5, "2e-5"),
     (-0.5, "-0.5"),     (None, "–"), (float("nan"), "–"), (100, "100"), (999.7, "1,000"), (1e-3, "0.001")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_units_fit_the_size() -> None:
    assert [bytes_text(size) for size in (12, 4.2e3, 8.43e6, 15.31e9, None)] == [
        "12 B",
        "4.2 kB",
        "8.43 MB",
        "15.3 GB",
        "–",
    ]
    assert [duration(time) for time in (1.23, 42, 192.4, 7500, None)] == [
        "1.2 s",
        "42 s",
        "3 min 12 s",
        "2 h 05 min",
        "–",
    ]
    assert [percent(1, 2), percent(2.1, 2), percent(1, 1), percent(1, 0)] == ["−50 %", "+5 %", "±0 %", "–"]
    assert loss(2.34567) == "2.346"


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (2.1, 7.9), (0.0, 3e9), (5.0, 5.0), (0.0, 0.0), (-1e-6, 2e-6), (1, 60)]
)
def test_ticks_are_round_and_span_the_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 2 <= len(found) <= 8
    assert found == sorted(set(found))
