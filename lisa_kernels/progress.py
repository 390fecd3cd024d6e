"""A progress bar for what takes long and says nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(description: str, total: object, console: Console | None = None) -> Iterator[Callable[..., None]]:
    """Show how far something is while it runs; yields what is to be called after each part, or with how many.

    total: how many parts there are, or what has a length; of anything else the number is not known. console: where;
    None: standard error. Nothing is shown where that is no terminal, and nothing is left at the end.
    """
    console = console or Console(stderr=True)
    parts = total if isinstance(total, int) else len(total) if isinstance(total, Sized) else None
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(description, total=parts)
        yield partial(bar.advance, task)
