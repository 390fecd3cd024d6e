"""A device whose queues run as late as they may, or at random: what is not waited for is then not done yet.

Its memory is handed out again at once, as torch's allocator does, and its copies need locked host memory.
"""

from __future__ import annotations

import ctypes
import random
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lisa_kernels.paging.queues import Event, Lanes, Queue

Action = Callable[[], None]

# Who must wait, and for whom: a page that arrives, is used, and departs.
ORDERINGS = {
    "arrival-of-what-left": ("in", "out"),
    "arrival-in-used-memory": ("in", "work"),
    "use-of-what-arrives": ("work", "in"),
    "departure-of-what-is-used": ("out", "work"),
    "reuse-of-memory-that-leaves": ("work", "out"),
    "departure-to-memory-that-is-read": ("out", "in"),
    "reading-at-home": ("host", "out"),
}


class LateEvent:
    """A point in a queue."""

    def __init__(self, queue: LateQueue) -> None:
        self.queue, self.done = queue, False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        if ("host", self.queue.name) not in self.queue.device.forgotten:
            self.queue.run_until(self)


class LateQueue(Queue):
    """Work in order."""

    def __init__(self, device: LateLanes, name: str) -> None:
        self.device, self.name = device, name
        self.queued: deque[LateEvent | Action] = deque()
        self.waits: list[str] = []

    def wait(self, event: Event | None) -> None:
        if event is None:
            return
        assert isinstance(event, LateEvent)
        self.waits.append(event.queue.name)
        if (self.name, event.queue.name) not in self.device.forgotten:
            self.add(lambda: event.queue.run_until(event))

    def record(self) -> LateEvent:
        event = LateEvent(self)
        self.add(event)
        return event

    def copy_(self, target: Tensor, source: Tensor) -> None:
        where, whence, nbytes = target.data_ptr(), source.data_ptr(), source.numel()
        assert target.numel() == nbytes
        self.add(lambda: self.device.move(where, whence, nbytes))

    def zero_(self, target: Tensor) -> None:
        self.fill(target, 0)

    def fill(self, target: Tensor, value: int) -> None:
        where, nbytes = target.data_ptr(), target.numel()
        self.add(lambda: ctypes.memset(where, value, nbytes) and None)

    def expect(self, target: Tensor, value: int) -> None:
        """Note a fault where the memory then holds anything else."""
        where, nbytes = target.data_ptr(), target.numel()

        def look() -> None:
            if ctypes.string_at(where, nbytes) != bytes([value]) * nbytes:
                self.device.faults.append(f"other bytes than {value}")

        self.add(look)

    def add(self, work: LateEvent | Action) -> None:
        self.queued.append(work)
        self.device.run_some()

    def run(self) -> None:
        work = self.queued.popleft()
        if isinstance(work, LateEvent):
            work.done = True
        else:
            work()

    def run_until(self, event: LateEvent) -> None:
        while not event.done:
            self.run()


class LateLanes(Lanes):
    """One such device; `seed` makes it run at random, and `forgotten` names (who waits, for whom) that is left out."""

    def __init__(
        self, seed: int | None = None, forgotten: set[tuple[str, str]] | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008  (a constant)
    ) -> None:  # fmt: skip
        self.device, self.queued = device, True
        self.random = None if seed is None else random.Random(seed)
        self.forgotten = forgotten or set()
        self.inwards, self.outwards, self._work = (LateQueue(self, name) for name in ("in", "out", "work"))
        self.capturing = False
        self.faults: list[str] = []
        self.locked: dict[int, int] = {}
        self._blocks: list[np.ndarray] = []
        self._free: list[np.ndarray] = []
        self.live_bytes = self.peak_bytes = 0

    @property
    def work(self) -> LateQueue:
        return self._work

    @property
    def being_captured(self) -> bool:
        return self.capturing

    def empty(self, nbytes: int) -> Tensor:
        fitting = [number for number, block in enumerate(self._free) if block.size == nbytes]
        if not fitting:
            self._blocks.append(np.zeros(nbytes, np.uint8))
        block = self._free.pop(fitting[-1]) if fitting else self._blocks[-1]
        # The tensor's storage keeps this view alive, and nothing else does.
        given = block.view()
        weakref.finalize(given, self._take_back, block)
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return torch.frombuffer(given, dtype=torch.uint8)

    def _take_back(self, block: np.ndarray) -> None:
        self._free.append(block)
        self.live_bytes -= block.size

    def lock(self, address: int, nbytes: int) -> int:
        self.locked[address] = nbytes
        return 0

    def unlock(self, address: int) -> None:
        del self.locked[address]

    def move(self, where: int, whence: int, nbytes: int) -> None:
        for begin in (where, whence):
            on_device = any(block.ctypes.data <= begin < block.ctypes.data + block.size for block in self._blocks)
            locked = any(address <= begin and begin + nbytes <= address + n for address, n in self.locked.items())
            if not on_device and not locked:
                self.faults.append("a copy of memory that is no longer locked")
                return
        ctypes.memmove(where, whence, nbytes)

    def run_some(self) -> None:
        """Run what a device that does not wait to be waited for would have run by now."""
        while self.random is not None and self.random.random() < 0.5:
            queue = self.random.choice([self.inwards, self.outwards, self._work])
            if queue.queued:
                queue.run()

    def run_all(self) -> None:
        for queue in (self.inwards, self.outwards, self._work):
            while queue.queued:
                queue.run()
