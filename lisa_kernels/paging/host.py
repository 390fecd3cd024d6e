"""The store that keeps slabs in host memory, locked where a GPU copies from it, and moves them beside other work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.paging.buffers import Buffer, Ring, Slot, Slots, copy_in_order
from lisa_kernels.paging.locked import HostMemory
from lisa_kernels.paging.queues import Lanes
from lisa_kernels.paging.store import Page, Store


class _Device:
    """What the pages of one device share."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes, self.memory = lanes, HostMemory(lanes)
        # By the bytes of their slots; 0 is for pages that stay.
        self.slots: dict[int, Slots] = {}
        self.idle: dict[int, list[Buffer]] = {}


class HostStore(Store):
    """Keeps pages in host memory: one buffer for each page, of its exact size, used again once its page is freed.

    Copies in and out run on queues of their own, in both directions at once.
    """

    kind = "host"

    def __init__(self, lanes: Callable[[torch.device], Lanes] = Lanes) -> None:
        self._lanes = lanes
        self._devices: dict[torch.device, _Device] = {}
        self._held = 0
        # Told of each piece of memory that is made on a device; plans count them.
        self.watchers: list[Callable[[Tensor], None]] = []

    def page(self, name: str, nbytes: int, device: torch.device, slot_bytes: int = 0) -> HostPage:
        """Return a new page of zeros for slabs of `device`."""
        if device not in self._devices:
            self._devices[device] = _Device(self._lanes(device))
        there = self._devices[device]
        if slot_bytes not in there.slots:
            lanes, watchers = there.lanes, self.watchers
            there.slots[slot_bytes] = Ring(lanes, watchers, slot_bytes) if slot_bytes else Slots(lanes, watchers)
        return HostPage(self, name, nbytes, there.lanes, there.slots[slot_bytes])

    @property
    def nbytes(self) -> int:
        """How many bytes of host memory the store holds."""
        return self._held

    def device_bytes(self, device: torch.device) -> int:
        """Return how many bytes of a device's memory pages have there now."""
        return sum(slots.nbytes for slots in self._devices[device].slots.values()) if device in self._devices else 0

    def borrow(self, nbytes: int, device: torch.device) -> Buffer:
        """Return a buffer, uint8 [nbytes] of any content, that copies from and to `device` can use."""
        idle = self._devices[device].idle.get(nbytes)
        if idle:
            return idle.pop()
        try:
            buffer = self._devices[device].memory.buffer(nbytes)
        except RuntimeError as error:
            raise InputError(
                f"host memory has no {nbytes} bytes left for a page, beside {self._held} that pages hold; "
                'use paging="file:DIR" with a folder on a fast disk.'
            ) from error
        self._held += nbytes
        return buffer

    def put_away(self, buffer: Buffer, device: torch.device) -> None:
        """Take a buffer back, for the next page of its size."""
        self._devices[device].idle.setdefault(buffer.bytes.numel(), []).append(buffer)

    def close(self) -> None:
        """Let the host's memory go, once the last copies of freed pages are over."""
        for there in self._devices.values():
            for buffer in (buffer for each in there.idle.values() for buffer in each):
                if buffer.last.event is not None:
                    buffer.last.event.synchronize()
        self._devices.clear()
        self._held = 0


class HostPage(Page):
    """A slab that is at home in host memory."""

    def __init__(self, store: HostStore, name: str, nbytes: int, lanes: Lanes, slots: Slots) -> None:
        super().__init__(name, nbytes, lanes.device)
        self._store, self._lanes, self._slots = store, lanes, slots
        # From the first `give_back` on: a slab that never leaves the device takes no host memory.
        self._home: Buffer | None = None
        self._slot: Slot | None = None
        slots.expect(nbytes)

    @property
    def _held(self) -> Slot | None:
        """The page's slot; one that was not taken may have been given to another page meanwhile."""
        return self._slot if self._slot is not None and self._slot.is_of(self) else None

    @property
    def on_device(self) -> bool:
        """Whether the slab is on the device or on its way there."""
        return self._held is not None

    def prefetch(self) -> None:
        """Begin the copy to the device, where there is room for it."""
        if self._home is not None and self._held is None:
            self._come(self._home, ahead=True)

    def _come(self, home: Buffer | None, ahead: bool) -> None:
        self._slot = self._slots.lease(self, self.nbytes, ahead)
        if self._slot is not None and home is not None:
            copy_in_order(self._lanes.inwards, self._slot, home)

    def take(self) -> Tensor:
        """Return the slab on the device; the current stream waits for the copy, the host does not."""
        slot, fresh = self._held, False
        if slot is None:
            self._come(self._home, ahead=False)
            slot, fresh = self._slot, self._home is None
            assert slot is not None
        work = self._lanes.work
        work.wait(slot.last.event)
        if fresh:
            work.zero_(slot.bytes)
        slot.taken = True
        return slot.bytes

    def give_back(self) -> None:
        """Begin the copy home and leave the device's memory."""
        slot = self._held
        if slot is not None and slot.taken:
            if self._home is None:
                self._home = self._store.borrow(self.nbytes, self.device)
            slot.last.event = self._lanes.work.record()
            copy_in_order(self._lanes.outwards, self._home, slot)
            self._leave(slot)

    def _leave(self, slot: Slot) -> None:
        self._slot = None
        self._slots.leave(slot)

    def home(self) -> Tensor:
        """Return the slab in host memory."""
        return torch.zeros(self.nbytes, dtype=torch.uint8, device="cpu") if self._home is None else self._home.bytes

    def settle(self) -> None:
        """Wait for the copy home."""
        if self._home is not None and self._home.last.event is not None:
            self._home.last.event.synchronize()

    def free(self) -> None:
        """Give the buffer to the next page of its size, and leave the device's memory."""
        slot = self._held
        if slot is not None:
            if slot.taken:
                slot.last.event = self._lanes.work.record()
            self._leave(slot)
        if self._home is not None:
            self._store.put_away(self._home, self.device)
        self._home = None
