"""Scores shown in the terminal and as a picture."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from lisa_kernels.errors import InputError
from lisa_kernels.scores.report import bar_chart, plot_scores


def charted(scores: list[float], encoding: str = "utf-8", width: int = 80) -> tuple[str, list[str]]:
    """Return the text of a chart and the lines of its layers."""
    raw = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    bar_chart(scores, "Outlier ratio", Console(file=raw, width=width, color_system=None))
    raw.seek(0)
    text = raw.read()
    return text, [line for line in text.splitlines() if "█" in line or "#" in line]


def test_bars_are_as_long_as_the_scores() -> None:
    text, lines = charted([0.5, 1.0, 0.25])
    lengths = [line.count("█") for line in lines]
    assert "Outlier ratio" in text
    assert lengths == [lengths[1] // 2, lengths[1], round(lengths[1] / 4)]
    assert ["0.5" in lines[0], "1" in lines[1], "0.25" in lines[2]] == [True] * 3


def test_a_terminal_without_unicode_gets_plain_bars() -> None:
    _, lines = charted([1.0], encoding="ascii")
    assert lines[0].count("#") >= 10


@pytest.mark.parametrize("scores", [[], [0.0, 0.0], [float("nan"), float("inf")]], ids=["none", "zeros", "not-finite"])
def test_scores_without_a_length_give_no_bars(scores: list[float]) -> None:
    assert charted(scores)[1] == []


@pytest.mark.parametrize("suffix", [".png", ".svg", ".PDF"])
def test_a_picture_is_written_in_the_format_of_its_suffix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scores{suffix}"
    plot_scores([0.5, 1.0, 0.25], path, "Outlier ratio")
    head = path.read_bytes()[:100]
    assert {".png": b"\x89PNG", ".svg": b"<?xml", ".PDF": b"%PDF"}[suffix] in head


@pytest.mark.parametrize("name", ["scores.doc", "scores"])
def test_an_unknown_format_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="names no picture format"):
        plot_scores([1.0], tmp_path / name, "title")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="could not be written"):
        plot_scores([1.0], tmp_path / "missing" / "scores.png", "title")
