"""Live progress of a flow's training."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class FlowProgress:
    """A bar with loss, images per second and the group that trains; plain lines where there is no terminal."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self.console, self.steps = console, steps
        text = TextColumn("[progress.description]{task.description}")
        columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task: Any = self._bar.add_task("training", total=steps, completed=done)
        self._loss, self._said = float("nan"), ""

    def __enter__(self) -> FlowProgress:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Take the bar down."""
        self._bar.stop()

    def advance(self, group: int, speed: float) -> None:
        """Count a step of `group`."""
        self._said = f"loss {self._loss:.3f} · {speed:,.0f} images/s · group {group}"
        self._bar.update(self._task, advance=1, description=self._said)

    def log(self, step: int, loss: float, rate: float) -> None:
        """Take the loss over; print a line where there is no bar."""
        self._said, self._loss = self._said.replace(f"loss {self._loss:.3f}", f"loss {loss:.3f}"), loss
        if not self.console.is_terminal:
            self.console.print(f"step {step}/{self.steps} · {self._said} · lr {rate:.2e}", highlight=False)
