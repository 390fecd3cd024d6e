"""Memory that copies run from and to on their own: whose turn it is, and when it may be let go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from torch import Tensor

from lisa_kernels.paging.queues import Event, Lanes, Queue

# One in use, one on its way to the device, one on its way from it.
RING_SLOTS = 3


class LastUse:
    """The last thing that was queued on a piece of memory; every use waits for the one before, so it is of all."""

    def __init__(self, lanes: Lanes, event: Event | None = None) -> None:
        self._lanes, self.event = lanes, event

    @property
    def may_be_left(self) -> bool:
        """Whether the memory may be let go without a wait."""
        return not self._lanes.being_captured and (self.event is None or self.event.query())


class Buffer:
    """A piece of memory, uint8 [n], and its last use."""

    def __init__(self, content: Tensor, last: LastUse) -> None:
        self.bytes, self.last = content, last


def copy_in_order(queue: Queue, target: Buffer, source: Buffer) -> None:
    """Queue a copy after the last uses of both its ends."""
    queue.wait(target.last.event)
    queue.wait(source.last.event)
    queue.copy_(target.bytes, source.bytes)
    target.last.event = source.last.event = queue.record()


class _Remains:
    """Memory whose owner is gone while it is still in use; garbage, so that the next collection looks again."""

    def __init__(self) -> None:
        self.itself = self


def let_go(last: LastUse, release: Callable[[], None], *memory: object) -> None:
    """Call `release` and drop the memory once its last use is over, without ever waiting for it.

    For finalizers, which run in the middle of anything: in a backward, on another thread, in the capture of a graph.
    """
    if last.may_be_left:
        release()
    else:
        let_go_after(_Remains(), last, release, *memory)


def let_go_after(
    owner: object, last: LastUse, release: Callable[[], None], *memory: object
) -> weakref.finalize[..., object]:
    """Let memory go once its owner is gone and its last use is over; at the end of the process nothing is done."""
    end = weakref.finalize(owner, let_go, last, release, *memory)
    end.atexit = False
    return end


def _nothing() -> None:
    pass


class Slot(Buffer):
    """Device memory for one page after the other; `page` has it now, and `bytes` are that page's part of it."""

    def __init__(self, lanes: Lanes, capacity: int) -> None:
        # The memory is that queue's, and what was queued there before may still use it.
        self._queue = lanes.work
        self.memory = lanes.empty(capacity)
        super().__init__(self.memory, LastUse(lanes, self._queue.record()))
        self.page: weakref.ref[object] | None = None
        self.taken = False
        # Where all of it ends in the middle of a copy: one that comes late would write what is no longer ours.
        self._end = let_go_after(self, self.last, _nothing, self.memory)

    @property
    def capacity(self) -> int:
        """How many bytes it takes."""
        return self.memory.numel()

    @property
    def idle(self) -> bool:
        """Whether no page has it."""
        return self.page is None

    @property
    def lost(self) -> bool:
        """Whether the page that has it is gone."""
        return self.page is not None and self.page() is None

    def is_of(self, page: object) -> bool:
        """Whether this page has it."""
        return self.page is not None and self.page() is page

    def give_back_memory(self) -> None:
        """Let the queue whose memory it is use it again after its last use here; the slot is none from now on."""
        self._queue.wait(self.last.event)
        self._end.detach()
        # Whoever still knows the slot does not hold the memory.
        del self.memory, self.bytes


class Slots:
    """The device memory of pages that stay: each has its own, and its queue has it again as soon as it is left."""

    def __init__(self, lanes: Lanes, watchers: Sequence[Callable[[Tensor], None]]) -> None:
        self._lanes, self._watchers = lanes, watchers
        self._slots: list[Slot] = []

    @property
    def nbytes(self) -> int:
        """How many bytes of the device are held."""
        return sum(slot.capacity for slot in self._slots)

    def expect(self, nbytes: int) -> None:
        """Know of a page before it comes."""

    def lease(self, page: object, nbytes: int, ahead: bool = False) -> Slot | None:
        """Return a slot for a page; ahead: it is not needed yet, and None is an answer."""
        self._find_lost()
        return self._hand(self._make(nbytes), page, nbytes, ahead)

    def leave(self, slot: Slot) -> None:
        """Take a slot back after its last use."""
        slot.page = None
        self._tidy()

    def _find_lost(self) -> None:
        """Take back the slots of pages that are gone: whatever was queued on them is queued by now."""
        for slot in [slot for slot in self._slots if slot.lost]:
            work = self._lanes.work
            work.wait(slot.last.event)
            slot.last.event = work.record()
            self.leave(slot)

    def _tidy(self) -> None:
        self._drop([slot for slot in self._slots if slot.idle])

    def _make(self, capacity: int) -> Slot:
        slot = Slot(self._lanes, capacity)
        self._slots.append(slot)
        for watch in self._watchers:
            watch(slot.memory)
        return slot

    def _hand(self, slot: Slot, page: object, nbytes: int, ahead: bool) -> Slot:
        slot.bytes, slot.page, slot.taken = slot.memory[:nbytes], weakref.ref(page), not ahead
        return slot

    def _drop(self, slots: list[Slot]) -> None:
        for slot in slots:
            self._slots.remove(slot)
            slot.give_back_memory()


class Ring(Slots):
    """The device memory of pages that come for a moment, one after the other: three slots, used again in their order.

    Slots are as large as the largest page of at most `slot_bytes`; a larger page has one of its own size. Never more
    bytes are held than three slots, or than pages that are in use at once and the next one on its way; none are where
    no page is there or on its way. A copy into a slot waits on the device for the slot's last use, the host for
    nothing.
    """

    def __init__(self, lanes: Lanes, watchers: Sequence[Callable[[Tensor], None]], slot_bytes: int) -> None:
        super().__init__(lanes, watchers)
        self._slot_bytes, self._largest = slot_bytes, 0

    def expect(self, nbytes: int) -> None:
        """Know of a page before it comes."""
        if nbytes <= self._slot_bytes:
            self._largest = max(self._largest, nbytes)

    def lease(self, page: object, nbytes: int, ahead: bool = False) -> Slot | None:
        """Return a slot for a page; None for one that is ahead of its use where another one is and takes the room.

        A page that is needed now takes the room of those that are not; they come again when it is their turn.
        """
        self._find_lost()
        capacity, limit = max(nbytes, self._largest), RING_SLOTS * self._largest
        coming = [slot for slot in self._slots if not slot.idle and not slot.taken]
        if coming and self._busy_bytes() + capacity > limit:
            if ahead:
                return None
            for slot in coming:
                slot.page = None
        return self._hand(self._room_for(capacity, limit), page, nbytes, ahead)

    def _room_for(self, capacity: int, limit: int) -> Slot:
        """Return a new slot, or the one that was left first, and drop those that there is no room for beside it."""
        idle = [slot for slot in self._slots if slot.idle]
        needed, again = self.nbytes + capacity, None
        if needed > limit:
            again = next((slot for slot in idle if slot.capacity == capacity), None)
            needed -= capacity if again is not None else 0
        for slot in idle:
            if needed > limit and slot is not again:
                needed -= slot.capacity
                self._drop([slot])
        if again is None:
            return self._make(capacity)
        # To the end, so that slots stay in the order of their uses.
        self._slots.remove(again)
        self._slots.append(again)
        return again

    def _busy_bytes(self) -> int:
        return sum(slot.capacity for slot in self._slots if not slot.idle)

    def _tidy(self) -> None:
        if all(slot.idle for slot in self._slots):
            super()._tidy()
