"""One number per layer, as bars in the terminal or in a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lisa_kernels.errors import InputError


def bar_chart(scores: Sequence[float], title: str, console: Console) -> None:
    """Print a table of the layers with their scores and bars; the longest bar is the largest score."""
    top = max((score for score in scores if math.isfinite(score)), default=0.0)
    longest = max(10, min(60, console.width - 30))
    mark = "█" if console.encoding.lower().startswith("utf") else "#"
    table = Table(title=title)
    table.add_column("layer", justify="right")
    table.add_column("score", justify="right")
    table.add_column("", no_wrap=True)
    for layer, score in enumerate(scores):
        length = round(longest * score / top) if top > 0 and math.isfinite(score) else 0
        table.add_row(str(layer), f"{score:.4g}", mark * length)
    console.print(table)


def new_figure(path: str | Path, width: float = 8.0, height: float = 4.0) -> Any:
    """Return an empty matplotlib figure, sides in inches, for a file whose suffix names the format, such as `.png`.

    Raises InputError for another suffix, and without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "a picture needs matplotlib, which is not installed: pip install 'lisa_kernels[train]', or leave it out."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    formats = FigureCanvasAgg(figure).get_supported_filetypes()
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in formats:
        raise InputError(f"{str(path)!r} names no picture format: end it in one of .{', .'.join(sorted(formats))}.")
    return figure


def save_figure(figure: Any, path: str | Path) -> None:
    """Write the figure to the file; raises InputError where that cannot be."""
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(
            f"the plot could not be written to {str(path)!r} ({error.strerror}): give a file in an existing folder "
            f"that can be written."
        ) from error


def plot_scores(scores: Sequence[float], path: str | Path, title: str) -> None:
    """Write a bar chart of the layers to a file whose suffix names the format, such as `.png` or `.svg`."""
    figure = new_figure(path)
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    axes.bar(range(len(scores)), list(scores))
    axes.set_title(title)
    axes.set_xlabel("layer")
    axes.set_ylabel("score")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save_figure(figure, path)
