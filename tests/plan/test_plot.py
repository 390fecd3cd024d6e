"""The picture of a run's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lisa_kernels.errors import InputError
from lisa_kernels.methods import LISA
from lisa_kernels.plan.plot import plot_timeline, stacked
from lisa_kernels.plan.rehearsal import Workload
from lisa_kernels.plan.result import Plan
from lisa_kernels.plan.trace import CATEGORIES

from .traces import MB, sizes, small_run


def test_every_event_of_a_short_run_is_shown() -> None:
    numbers, rows = stacked(small_run())
    assert numbers == list(range(8))
    assert rows[CATEGORIES.index("saved activations")] == [size * MB for size in (0, 40, 60, 60, 40, 0, 0, 0)]
    assert [sum(column) for column in zip(*rows)] == small_run().timeline()


@pytest.mark.parametrize("points", [1, 2, 3, 5])
def test_a_long_run_keeps_its_peak(points: int) -> None:
    """Among 41 events one stands out; it is shown however few points there are."""
    up_and_down = [change for number in range(20) for change in ((number, 10), (number, -10))]
    run = sizes(*up_and_down[:24], (99, 500), *up_and_down[24:])
    numbers, rows = stacked(run, points)
    assert len(numbers) <= points
    assert run.peak_index in numbers
    assert max(map(sum, zip(*rows))) == run.peak_bytes


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_written(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"timeline.{suffix}"
    plot_timeline(Plan(Workload("preset:tiny", LISA()), small_run()), path)
    assert path.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_another_suffix_and_another_folder_are_refused(tmp_path: Path) -> None:
    plan: Any = Plan(Workload("preset:tiny", LISA()), small_run())
    with pytest.raises(InputError, match="names no picture format"):
        plot_timeline(plan, tmp_path / "timeline.txt")
    with pytest.raises(InputError, match="existing folder"):
        plot_timeline(plan, tmp_path / "missing" / "timeline.png")
