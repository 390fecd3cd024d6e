"""What a run is better with and not lost without."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from rich.console import Console

Made = TypeVar("Made")


def ornament(what: str, make: Callable[[], Made], console: Console) -> Made | None:
    """Return what `make` makes; None, and a sentence on the console, where it fails."""
    try:
        return make()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        # Where the terminal itself is gone there is nobody to tell.
        with suppress(OSError, ValueError):
            console.print(f"note: {what} is left out ({reason}).", style="yellow", highlight=False, markup=False)
        return None
