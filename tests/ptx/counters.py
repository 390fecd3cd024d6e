"""What a launch did: instructions, global traffic by access width, shared-memory bank conflicts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

WARP = 32
SECTOR_BYTES = 32
BANKS, BANK_BYTES = 32, 4


@dataclass
class Traffic:
    """Requests for global memory: one per warp and instruction.

    `widths` counts requests by the bytes that one lane moves; `sectors` counts the 32-byte pieces that they touch.
    """

    widths: Counter[int] = field(default_factory=Counter)
    bytes: int = 0
    sectors: int = 0

    @property
    def requests(self) -> int:
        """The number of requests of every width."""
        return sum(self.widths.values())

    @property
    def widest(self) -> int:
        """Bytes per lane of the widest request; 0 if there was none."""
        return max(self.widths, default=0)

    def record(self, addresses: NDArray[np.int64], active: NDArray[np.bool_] | None, width: int) -> None:
        """Count one instruction; `addresses` has one entry per lane, in whole warps."""
        touched = addresses // SECTOR_BYTES
        if active is None:
            lanes, warps = addresses.size, addresses.size // WARP
        else:
            touched = np.where(active, touched, -1)
            lanes, warps = int(np.count_nonzero(active)), int(active.reshape(-1, WARP).any(1).sum())
        # A width above a sector's touches several per lane, all of them in full.
        self.sectors += int(_distinct(touched.reshape(-1, WARP)).sum()) * max(1, width // SECTOR_BYTES)
        self.widths[width] += warps
        self.bytes += lanes * width


@dataclass
class SharedTraffic:
    """Passes over the 32 banks: `wavefronts` made, `ideal` with no conflict."""

    wavefronts: int = 0
    ideal: int = 0

    def record(self, addresses: NDArray[np.int64], active: NDArray[np.bool_] | None, width: int) -> None:
        """Count one instruction; wide accesses go in phases of 128 bytes."""
        words = max(1, width // BANK_BYTES)
        word = addresses[:, None] // BANK_BYTES + np.arange(words)
        if active is not None:
            word = np.where(active[:, None], word, -1)
        self.record_words(word.reshape(-1, WARP))

    def record_words(self, phases: NDArray[np.int64]) -> None:
        """Count one pass per row of 32 word numbers; −1 is no access."""
        ordered = np.sort(phases, axis=1)
        first = ordered >= 0
        first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
        key = np.arange(len(phases))[:, None] * BANKS + ordered % BANKS
        per_bank = np.bincount(key[first], minlength=len(phases) * BANKS).reshape(-1, BANKS)
        worst = per_bank.max(1)
        self.wavefronts += int(worst.sum())
        self.ideal += int(np.count_nonzero(worst))


@dataclass
class Counters:
    """Totals over all programs of a launch.

    `instructions` counts warp instructions by opcode; a barrier counts once per program.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    barriers: int = 0
    loads: Traffic = field(default_factory=Traffic)
    stores: Traffic = field(default_factory=Traffic)
    atomics: Traffic = field(default_factory=Traffic)
    shared_loads: SharedTraffic = field(default_factory=SharedTraffic)
    shared_stores: SharedTraffic = field(default_factory=SharedTraffic)

    @property
    def warp_instructions(self) -> int:
        """The number of warp instructions of every kind."""
        return sum(self.instructions.values())


def _distinct(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many different numbers from 0 upward stand in each row."""
    ordered = np.sort(rows, axis=1)
    first = ordered >= 0
    first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return first.sum(1)
