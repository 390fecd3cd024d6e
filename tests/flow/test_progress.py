"""Live progress of training."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lisa_kernels.flow.progress import FlowProgress


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_shows_loss_speed_and_group(terminal: bool) -> None:
    """As a bar in a terminal, else a line for each log."""
    out = io.StringIO()
    with FlowProgress(Console(file=out, force_terminal=terminal, width=140), steps=20, done=10) as progress:
        progress.advance(3, 1234.5)
        progress.log(11, 0.5, 1e-3)
        progress.advance(0, 1234.5)
    text = out.getvalue()
    for said in ("1,234 images/s", "group 3" if not terminal else "group 0"):
        assert said in text
    if terminal:
        assert "12/20" in text
        assert "loss 0.500" in text
    else:
        assert text == "step 11/20 · loss 0.500 · 1,234 images/s · group 3 · lr 1.00e-03\n"
