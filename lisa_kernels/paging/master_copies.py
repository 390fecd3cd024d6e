"""Copies between masters in host memory and the device on queues of their own; the host waits once for many of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from lisa_kernels.paging.buffers import Slot
from lisa_kernels.paging.locked import HostMemory
from lisa_kernels.paging.queues import Event, Lanes

# Of masters that pass through the device: one is worked on while the next one comes and the one before goes.
BUFFERS = 2
Rows = TypeVar("Rows")


class _Device:
    """What copies to and from one device share."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes, self.memory = lanes, HostMemory(lanes)
        self.slots: list[Slot] = []
        # Weights whose copies are on their way home, and when those are there.
        self.leaving: list[tuple[Tensor, Event | None]] = []
        self.gone: Event | None = None
        self.come: Event | None = None

    def bring(self, part: Tensor) -> tuple[Slot, Tensor]:
        """Begin to copy rows of a master into the buffer that was left first."""
        slot = self.slots.pop(0) if len(self.slots) == BUFFERS else None
        if slot is not None and slot.capacity < part.nbytes:
            slot.give_back_memory()
            slot = None
        if slot is None:
            slot = Slot(self.lanes, part.nbytes)
        self.slots.append(slot)
        here = slot.memory[: part.nbytes].view(part.dtype).view(part.shape)
        inwards = self.lanes.inwards
        inwards.wait(slot.last.event)
        inwards.copy_(here, part)
        slot.last.event = inwards.record()
        return slot, here

    def send(self, slot: Slot, here: Tensor, part: Tensor) -> None:
        """Begin to copy rows home from their buffer, after the work queued so far."""
        outwards = self.lanes.outwards
        outwards.wait(self.lanes.work.record())
        outwards.copy_(part, here)
        slot.last.event = self.gone = outwards.record()

    def make_room(self, nbytes: int) -> None:
        """Give up as many bytes of weights that leave, the first ones first; their memory waits for their copies."""
        while nbytes > 0 and self.leaving:
            weight, gone = self.leaving.pop(0)
            self.lanes.work.wait(gone)
            nbytes -= weight.nbytes

    def finish(self) -> None:
        """Wait until all is home, and give the device's memory up."""
        if self.gone is not None:
            self.gone.synchronize()
        self.lanes.work.wait(self.come)
        for slot in self.slots:
            slot.give_back_memory()
        self.slots, self.leaving, self.gone, self.come = [], [], None, None


class MasterCopies:
    """Masters on their way; none of those whose copy home was begun is to be read before `finish`.

    Masters in memory that cannot be locked are copied all the same, and the host waits for each then. Bytes on the
    device beyond those of the weights: two of the largest tiles that pass through, until `finish`.
    """

    def __init__(self, lanes: Callable[[torch.device], Lanes] = Lanes) -> None:
        self._lanes = lanes
        self._devices: dict[torch.device, _Device] = {}
        self._away: set[int] = set()
        # Told of the bytes of each copy, and whether it goes to the device.
        self.watchers: list[Callable[[int, bool], None]] = []

    def __reduce__(self) -> tuple[object, ...]:
        """A copy of a model has copies of its own; its masters are read, and so none may be on its way."""
        self.finish()
        return MasterCopies, (self._lanes,)

    def _at(self, device: torch.device) -> _Device:
        if device not in self._devices:
            self._devices[device] = _Device(self._lanes(device))
        return self._devices[device]

    def in_memory(self, weight: Tensor, device: torch.device) -> Tensor:
        """Return a weight in host memory, which is locked where a GPU copies from it and to it.

        Of a weight without values, a plan's, a tensor that takes no memory.
        """
        if weight.is_meta:
            return torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
        if weight.device.type == "cpu" and (device.type != "cuda" or weight.is_pinned()):
            return weight
        held = self._at(device).memory.buffer(weight.nbytes).bytes.view(weight.dtype).view(weight.shape)
        return held.copy_(weight)

    def through(self, tiles: Iterable[tuple[Rows, Tensor]], device: torch.device) -> Iterator[tuple[Rows, Tensor]]:
        """Yield each tile of a master on the device; what is there when the next one is asked for goes home.

        The next one is then on its way already.
        """
        there = self._at(device)
        before: tuple[Rows, Tensor, Slot, Tensor] | None = None
        for rows, part in tiles:
            self._tell(part, True)
            coming = (rows, part, *there.bring(part))
            if before is not None:
                yield from self._worked_on(there, *before)
            before = coming
        if before is not None:
            yield from self._worked_on(there, *before)

    def _worked_on(
        self, there: _Device, rows: Rows, part: Tensor, slot: Slot, here: Tensor
    ) -> Iterator[tuple[Rows, Tensor]]:
        there.lanes.work.wait(slot.last.event)
        yield rows, here
        self._away.add(_memory_of(part))
        self._tell(part, False)
        there.send(slot, here, part)

    def _tell(self, part: Tensor, inwards: bool) -> None:
        for watch in self.watchers:
            watch(part.nbytes, inwards)

    def bring(self, master: Tensor, device: torch.device) -> Tensor:
        """Return a master's copy on the device, for work queued after `finish`."""
        there = self._at(device)
        there.make_room(master.nbytes)
        self._tell(master, True)
        here = torch.empty(master.shape, dtype=master.dtype, device=device)
        there.lanes.inwards.wait(there.lanes.work.record())
        there.lanes.inwards.copy_(here, master)
        there.come = there.lanes.inwards.record()
        return here

    def send(self, weight: Tensor, master: Tensor, room: int = 0) -> None:
        """Begin to copy a weight home after the work queued so far; its memory is held until it is there.

        room: bytes of weights sent before that are to be given up.
        """
        there = self._at(weight.device)
        there.make_room(room)
        self._tell(master, False)
        there.lanes.outwards.wait(there.lanes.work.record())
        there.lanes.outwards.copy_(master, weight)
        there.gone = there.lanes.outwards.record()
        there.leaving.append((weight, there.gone))
        self._away.add(_memory_of(master))

    def finish_for(self, master: Tensor) -> None:
        """Wait, if this master is on its way home, until it is there."""
        if self._away and _memory_of(master) in self._away:
            self.finish()

    def finish(self) -> None:
        """Wait until all masters are home, and have what came at hand for the work queued from now on."""
        for there in self._devices.values():
            there.finish()
        self._away.clear()


def _memory_of(master: Tensor) -> int:
    # One of a plan has no address.
    return int(master.untyped_storage()._cdata)
