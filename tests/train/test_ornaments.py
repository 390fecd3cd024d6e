"""What adorns a run fails with a sentence."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lisa_kernels.train.ornaments import ornament


def _fail(error: BaseException) -> None:
    raise error


def test_what_fails_is_one_line_and_what_does_not_is_returned() -> None:
    text = io.StringIO()
    console = Console(file=text, width=200)
    assert ornament("the sum", lambda: 1 + 1, console) == 2
    assert (
        ornament("the picture", lambda: _fail(ImportError("No module named 'matplotlib'\nlong story")), console) is None
    )
    assert text.getvalue() == "note: the picture is left out (No module named 'matplotlib').\n"


def test_a_ctrl_c_stops_it() -> None:
    with pytest.raises(KeyboardInterrupt):
        ornament("the picture", lambda: _fail(KeyboardInterrupt()), Console(file=io.StringIO()))


def test_a_terminal_that_is_gone_is_no_failure() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("Input/output error")

    assert ornament("the last line", lambda: _fail(ValueError("first")), Console(file=Gone())) is None
