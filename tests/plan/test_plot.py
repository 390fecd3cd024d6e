"""The picture of a run's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lisa_kernels.errors import InputError
from lisa_kernels.methods import LISA
from lisa_kernels.plan.moves import CODES_IN, MASTERS_IN, MASTERS_OUT, Move
from lisa_kernels.plan.plot import crossings, plot_timeline, stacked
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


MOVES = [
    Move(0, 5, CODES_IN),
    Move(3, 7, MASTERS_IN),
    Move(3, 2, MASTERS_OUT),
    Move(4, 1, CODES_IN),
    Move(8, 9, CODES_IN),
]


def test_what_crosses_over_is_summed_up_where_it_does() -> None:
    """In above zero, out below; what sets out after the last event is in the last stretch."""
    assert crossings(MOVES, 8, 4) == {CODES_IN: [5, 0, 1, 9], MASTERS_IN: [0, 7, 0, 0], MASTERS_OUT: [0, -2, 0, 0]}
    assert crossings([], 8) == {}


@pytest.mark.parametrize(("suffix", "moves"), [("png", []), ("svg", []), ("png", MOVES)])
def test_the_picture_is_written(suffix: str, moves: list[Move], tmp_path: Path) -> None:
    path = tmp_path / f"timeline.{suffix}"
    plot_timeline(Plan(Workload("preset:tiny", LISA()), small_run()), path, moves)
    assert path.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_another_suffix_and_another_folder_are_refused(tmp_path: Path) -> None:
    plan: Any = Plan(Workload("preset:tiny", LISA()), small_run())
    with pytest.raises(InputError, match="names no picture format"):
        plot_timeline(plan, tmp_path / "timeline.txt")
    with pytest.raises(InputError, match="existing folder"):
        plot_timeline(plan, tmp_path / "missing" / "timeline.png")
