"""The picture of which layers trained when, in the terminal and as a file."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from lisa_kernels.train.progress import plot_layer_history, print_layer_history

HISTORY = [[0, 2], [1, 2], [0, 1]]
NAMES = ["model.layers.0", "model.layers.1", "model.layers.2"]


def _printed(history: list[list[int]], width: int = 80) -> list[list[str]]:
    out = io.StringIO()
    print_layer_history(history, NAMES, 5, Console(file=out, width=width, legacy_windows=False))
    return [line.split() for line in out.getvalue().splitlines()[-3:]]


def test_a_row_per_layer_top_layer_first_a_column_per_period() -> None:
    rows = [[name, cells.replace("█", "#").replace("·", "."), count] for name, cells, count in _printed(HISTORY)]
    assert rows == [["2", "##.", "2×"], ["1", ".##", "2×"], ["0", "#.#", "2×"]]


def test_a_long_run_shows_its_last_periods() -> None:
    rows = _printed([[0]] * 100 + [[1]] * 10, width=40)
    assert rows[1][1].endswith(("█" * 10, "#" * 10))
    assert rows[1][2] == "10×"


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    plot_layer_history(HISTORY, NAMES, 5, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
