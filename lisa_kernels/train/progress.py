"""Live progress of a run, and the picture of which layers trained when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_kernels.methods import SampledAdamW


class LiveProgress(TrainerCallback):  # type: ignore[misc]
    """A progress bar with loss, rate, tokens per second and active layers; plain lines where there is no terminal."""

    def __init__(self, console: Console, optimizer: SampledAdamW, tokens_per_step: float) -> None:
        self.console, self.optimizer, self.tokens_per_step = console, optimizer, tokens_per_step
        self.loss = float("nan")
        self.seconds, self.steps = 0.0, 0
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of training rows per second of training steps (checkpoints and evaluation left out)."""
        return self.steps * self.tokens_per_step / self.seconds if self.seconds else 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        if self.console.is_terminal:
            text = TextColumn("[progress.description]{task.description}")
            self._bar = Progress(
                SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self.console
            )
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time."""
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step."""
        self.seconds += time.perf_counter() - self._started
        self.steps += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, description=self._describe())

    def _describe(self) -> str:
        layers = " ".join(str(index) for index in self.optimizer.active_layers) if self.optimizer.sampler else "all"
        return f"loss {self.loss:.3f} · {self.tokens_per_second:,.0f} tokens/s · layers {layers}"

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the loss over; print a line where there is no bar."""
        logs = kwargs.get("logs") or {}
        self.loss = logs.get("loss", self.loss)
        if self._bar is None and "loss" in logs:
            rate = logs.get("learning_rate", 0.0)
            line = f"step {state.global_step}/{state.max_steps} · {self._describe()} · lr {rate:.2e}"
            self.console.print(line, highlight=False)
        if "eval_loss" in logs:
            self.console.print(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}", highlight=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()


def _grid(history: Sequence[Sequence[int]], layers: int) -> list[list[bool]]:
    return [[layer in row for row in history] for layer in range(layers)]


def print_layer_history(history: Sequence[Sequence[int]], names: Sequence[str], period: int, console: Console) -> None:
    """Print one row per layer and one column per period, marked where the layer trained; top layer first."""
    grid = _grid(history, len(names))
    fits = max(8, console.width - 24)
    mark, blank = ("█", "·") if console.encoding.lower().startswith("utf") else ("#", ".")
    console.print(f"which layers trained when (one column per {period} steps)", style="bold", highlight=False)
    table = Table(show_header=False, box=None)
    for layer in reversed(range(len(names))):
        cells = "".join(mark if on else blank for on in grid[layer][-fits:])
        table.add_row(names[layer].rpartition(".")[2], cells, f"{sum(grid[layer])}×")
    console.print(table)


def plot_layer_history(history: Sequence[Sequence[int]], names: Sequence[str], period: int, path: Path) -> None:
    """Write the same picture to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 0.25 * len(names) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    columns = len(history)
    axes.imshow(_grid(history, len(names)), aspect="auto", cmap="Blues", vmin=0, vmax=1.3, origin="lower",
                interpolation="nearest", extent=(0, columns * period, -0.5, len(names) - 0.5))  # fmt: skip
    axes.set_yticks(range(len(names)), [name.rpartition(".")[2] for name in names])
    axes.set_xlabel("step")
    axes.set_ylabel("layer")
    axes.set_title("which layers trained when")
    figure.savefig(path, dpi=120)
