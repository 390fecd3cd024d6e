"""What is shown while something takes long."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lisa_kernels.progress import progress_bar


@pytest.mark.parametrize("total", [3, ["a", "b", "c"], iter("abc")], ids=["a number", "a list", "a stream"])
def test_a_terminal_is_told_how_far_it_is(total: object) -> None:
    told = io.StringIO()
    with progress_bar("scores [of] layers", total, Console(file=told, force_terminal=True, width=100)) as advance:
        advance()
        advance(2)
    assert "scores [of] layers" in told.getvalue()
    assert ("3/3" if not hasattr(total, "__next__") else "3/?") in told.getvalue()


def test_what_is_no_terminal_is_told_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    told = io.StringIO()
    for console in (Console(file=told), None):
        with progress_bar("layer scores", 3, console) as advance:
            advance()
    assert told.getvalue() == ""
    assert capfd.readouterr() == ("", "")
