"""The threads of a few programs, run side by side: one array element per thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .counters import WARP, Counters
from .faults import PtxError
from .memory import Memory
from .parser import TYPE_BYTES, Instruction, Module
from .shared_memory import SharedMemory

# Which lanes take part; None is all of them, the case that is kept fast.
Mask = NDArray[np.bool_] | None
# A register that is read before it is written gives this byte over and over, which no right result survives.
POISON = 0xA5


@dataclass(frozen=True)
class Checks:
    """Which faults to report; bounds, alignment and divergent barriers always are."""

    shared_races: bool = True
    global_races: bool = True
    uninitialised: bool = True


@dataclass
class Launch:
    """What all programs of a launch share. `noise` draws the errors of approximate instructions; None: none.

    counted: whether accesses of memory are counted, which takes a tenth of a launch.
    """

    module: Module
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    parameters: dict[str, NDArray[Any]]
    memory: Memory
    checks: Checks
    noise: np.random.Generator | None
    counted: bool = True
    counters: Counters = field(default_factory=Counters)


class Lanes:
    """Registers, places and shared memory of all threads of some programs.

    Registers are unsigned integers or bool, [lanes]; they are replaced and never written into, so that several may
    be one array.
    """

    def __init__(self, launch: Launch, programs: NDArray[np.int64]) -> None:
        threads = launch.threads
        self.launch = launch
        self.counters, self.memory = launch.counters, launch.memory
        self.count = len(programs) * threads
        self.programs = len(programs)
        self.thread = np.tile(np.arange(threads, dtype=np.int64), len(programs))
        # Numbered within these programs, and within the launch.
        self.program = np.repeat(np.arange(len(programs), dtype=np.int64), threads)
        self.program_id = np.repeat(programs, threads)
        self.global_program = self.program_id.astype(np.int32)
        self.warp = (np.arange(self.count) // WARP).astype(np.int32)
        self.lane = np.arange(self.count) % WARP
        self.exited = np.zeros(self.count, bool)
        self.shared = SharedMemory(len(programs), launch.shared_bytes)
        # Asynchronous copies: those not committed yet, then one list per committed group.
        self.open_copies: list[Callable[[], None]] = []
        self.copy_groups: list[list[Callable[[], None]]] = []
        fresh = {kind: self._fresh(kind) for kind in set(launch.module.registers.values())}
        self.registers: list[NDArray[Any]] = [fresh[kind] for kind in launch.module.registers.values()]
        self._special: dict[str, NDArray[np.uint32]] = {}

    def _fresh(self, kind: str) -> NDArray[Any]:
        if kind == "pred":
            return np.zeros(self.count, bool)
        return np.full(self.count * TYPE_BYTES[kind], POISON, np.uint8).view(f"u{TYPE_BYTES[kind]}")

    def special(self, name: str) -> NDArray[np.uint32]:
        """Return a special register such as `%tid.x`."""
        if name not in self._special:
            self._special[name] = np.broadcast_to(SPECIAL[name](self), (self.count,)).astype(np.uint32)
        return self._special[name]

    def live_warps(self, active: Mask) -> int:
        """Return how many warps have a lane that takes part."""
        if active is None:
            return self.count // WARP
        return int(active.reshape(-1, WARP).any(1).sum())

    def indices(self, active: Mask) -> NDArray[np.int64]:
        """Return the numbers of the lanes that take part."""
        return np.arange(self.count) if active is None else np.flatnonzero(active)

    def fault(self, kind: type[PtxError], instruction: Instruction, lane: int, message: str) -> PtxError:
        """Return an error that names the source line, the program and the thread."""
        where = f"program {self.program_id[lane]}, thread {self.thread[lane]}"
        return kind(f"{instruction.location}: {message} ({where}; `{instruction.text}`)")


SPECIAL: dict[str, Callable[[Lanes], Any]] = {
    "%tid.x": lambda lanes: lanes.thread,
    "%laneid": lambda lanes: lanes.lane,
    "%warpid": lambda lanes: lanes.thread // WARP,
    "%ntid.x": lambda lanes: lanes.launch.threads,
    "%ctaid.x": lambda lanes: lanes.program_id % lanes.launch.grid[0],
    "%ctaid.y": lambda lanes: lanes.program_id // lanes.launch.grid[0] % lanes.launch.grid[1],
    "%ctaid.z": lambda lanes: lanes.program_id // (lanes.launch.grid[0] * lanes.launch.grid[1]),
    "%nctaid.x": lambda lanes: lanes.launch.grid[0],
    "%nctaid.y": lambda lanes: lanes.launch.grid[1],
    "%nctaid.z": lambda lanes: lanes.launch.grid[2],
    "%tid.y": lambda lanes: 0,
    "%tid.z": lambda lanes: 0,
    "%ntid.y": lambda lanes: 1,
    "%ntid.z": lambda lanes: 1,
}
