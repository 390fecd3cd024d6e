"""Where a master is when it is not in memory, and what takes it to the device and back, as the layers see them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
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


class Copies(Protocol):
    """Copies of masters in memory to the device and back, which are done once `finish` says so."""

    def in_memory(self, weight: Tensor, device: torch.device) -> Tensor:
        """Return a weight in host memory, from where it can be copied to this device; of a plan, one without bytes."""

    def through(self, tiles: Iterable[tuple[slice, Tensor]], device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """Yield each tile of a master on the device; what is there when the next one is asked for goes home."""

    def bring(self, master: Tensor, device: torch.device) -> Tensor:
        """Return a master's copy on the device."""

    def send(self, weight: Tensor, master: Tensor, room: int = 0) -> None:
        """Begin to copy a weight home; room: bytes of weights sent before that are to be given up."""

    def finish_for(self, master: Tensor) -> None:
        """Wait, if this master is on its way home, until it is there."""

    def finish(self) -> None:
        """Wait until all masters are home, and have what came at hand."""
