"""The lines that a run leaves of itself, without a trainer."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from lisa_kernels.report import read_lines
from lisa_kernels.train.history_file import HistoryFile


def test_a_run_that_goes_on_keeps_its_lines_up_to_where_it_goes_on(tmp_path: Path) -> None:
    """Later ones, and one that a kill cut, are gone."""
    console = Console(file=io.StringIO())
    first = HistoryFile(tmp_path, console)
    first.begin({"max_steps": 9}, 0)
    for step in (1, 2, 3):
        first.add("log", step, loss=float("nan") if step == 1 else 0.5)
    with first.path.open("a") as file:
        file.write('{"kind": "log", "st')
    again = HistoryFile(tmp_path, console)
    again.begin({"max_steps": 8}, 2)
    again.add("log", 3, loss=0.25)
    lines = read_lines(again.path)
    assert [(line["kind"], line["step"]) for line in lines] == [("begin", 0), ("log", 1), ("log", 2), ("log", 3)]
    assert [line.get("loss") for line in lines] == [None, None, 0.5, 0.25]
    assert lines[0]["max_steps"] == 9


def test_a_file_that_cannot_be_written_costs_the_curves_alone(tmp_path: Path) -> None:
    out = io.StringIO()
    history = HistoryFile(tmp_path, Console(file=out, width=200))
    history.path.mkdir()
    history.add("log", 1, loss=0.5)
    history.add("log", 2, loss=0.5)
    assert out.getvalue().count("is not written on") == 1
    assert [line["step"] for line in history.lines] == [1, 2]
