"""Where a master is when it is not in memory, as the layers see it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor


class MasterHome(Protocol):
    """The home of one master: a file that is mapped, and another one for what it becomes."""

    def check(self) -> None:
        """Raise InputError where someone else has changed what is mapped."""

    def write(self, tiles: Iterable[Tensor]) -> Tensor:
        """Put a new master, whose rows come in tiles, in the place of the old one; returns it, mapped.

        Raises InputError, the old one as it was, where that cannot be done.
        """

    def aside(self, tiles: Iterable[Tensor]) -> Tensor:
        """Return a tensor like the master that takes no memory, of rows that come in tiles."""
