"""A run as the births and deaths of its storages: what was alive, when, and what it was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

CATEGORIES = (
    "weights", "gradients", "optimizer state", "bases", "saved activations", "loss", "temporaries", "pages",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """The birth (bytes > 0) or the death (bytes < 0) of one storage.

    storage: its number, never used again. category: one of `CATEGORIES`, what the storage turned out to be; the same at
    birth and death. phase: e.g. "attach", "step 2: backward". operation: e.g. "aten.mm.default". module: the path of
    the module whose forward was running. operation and module are "" where there was none.
    """

    storage: int
    bytes: int
    category: str
    phase: str
    operation: str
    module: str


class Trace:
    """The events of one run, in order; a storage without a death was alive at the end."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.events = tuple(events)

    def timeline(self) -> list[int]:
        """Return the bytes alive after each event."""
        return list(self._totals)

    @cached_property
    def _totals(self) -> list[int]:
        return list(accumulate(event.bytes for event in self.events))

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once."""
        return max(self._totals, default=0)

    @property
    def peak_index(self) -> int:
        """The number of the first event after which `peak_bytes` were alive; 0 of an empty trace."""
        return self._totals.index(self.peak_bytes) if self._totals else 0

    def alive_at(self, index: int) -> list[Event]:
        """Return the births of all storages alive after event number `index`, in order."""
        births: dict[int, Event] = {}
        for event in self.events[: index + 1]:
            if event.bytes > 0:
                births[event.storage] = event
            else:
                del births[event.storage]
        return list(births.values())

    def live_at(self, index: int) -> dict[str, int]:
        """Return the bytes alive after event number `index` by category, every category named."""
        totals = dict.fromkeys(CATEGORIES, 0)
        for event in self.alive_at(index):
            totals[event.category] += event.bytes
        return totals

    def phases(self) -> dict[str, int]:
        """Return the most bytes alive within each phase, in order; a phase begins with what the one before left."""
        peaks: dict[str, int] = {}
        alive = 0
        for event, total in zip(self.events, self._totals):
            peaks[event.phase] = max(peaks.get(event.phase, alive), total)
            alive = total
        return peaks
