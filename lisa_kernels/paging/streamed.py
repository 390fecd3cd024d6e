"""Pages that the device only reads, one after the other in an order that comes again: two buffers, one page ahead.

What is on the device does not grow with the number of pages. While one is read the next is on its way, into the buffer
of the one before. A copy waits on the device for the last reader of what it writes over, and readers for their copy;
the host waits for neither. For a page in a file it waits until the disk has brought it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.paging.locked import HostMemory
from lisa_kernels.paging.page_file import PageFile
from lisa_kernels.paging.page_homes import InFile, InMemory, PageHome, PageSlot
from lisa_kernels.paging.queues import Lanes
from lisa_kernels.paging.slab import SlabLayout

BUFFERS = 2
NOTHING = -1


class StreamedPage:
    """Named tensors that are at home in host memory or a file, and lent to the device where they are read."""

    def __init__(self, pages: StreamedPages, number: int, layout: SlabLayout, home: PageHome) -> None:
        self.number, self.layout, self.home = number, layout, home
        self._pages = pages
        self._there: _Readers | None = None
        self._views: weakref.WeakKeyDictionary[PageSlot, dict[str, Tensor]] = weakref.WeakKeyDictionary()

    @contextmanager
    def lent(self, device: torch.device) -> Iterator[Mapping[str, Tensor]]:
        """Lend the tensors by name on a device, to be read by what is queued there inside."""
        there = self._at(device)
        slot = there.take(self)
        try:
            yield self._seen_in(slot)
        finally:
            slot.last.event = there.lanes.work.record()

    def write(self, name: str, first: int, content: Tensor) -> None:
        """Put values [n] into a tensor at home from `first` on, in the order of the current stream where they are.

        What is lent from then on has them.
        """
        there = self._at(content.device)
        there.forget(self)
        if not content.is_meta:
            begin = self.layout.begin(name) + first * content.element_size()
            self.home.write(there.lanes, begin, content.view(torch.uint8))

    def _seen_in(self, slot: PageSlot) -> dict[str, Tensor]:
        if slot not in self._views:
            self._views[slot] = self.layout.views(slot.memory[: self.layout.nbytes])
        return self._views[slot]

    def _at(self, device: torch.device) -> _Readers:
        """Return the readers of a device; a page that was read elsewhere before is now theirs."""
        if self._there is None or self._there.lanes.device != device:
            self._there = self._pages.move(self, self._there, device)
        return self._there

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in host memory of its own, and has no device yet."""
        content = self.home.content()
        return {"_pages": self._pages, "number": self.number, "layout": self.layout, "content": content}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `__getstate__` returned."""
        home = InMemory.plain(state["content"])
        self.__init__(state["_pages"], state["number"], state["layout"], home)  # type: ignore[misc]


class StreamedPages:
    """The pages that are read in turns.

    Host memory: the bytes of all pages, locked where a GPU reads them; of pages in a file, what a GPU has. Device
    memory: of each device two buffers of its largest page, from the first time that one is read there; one, where there
    is a single page. file: where pages are to be, None: in host memory.
    """

    def __init__(self, lanes: Callable[[torch.device], Lanes] = Lanes, file: PageFile | None = None) -> None:
        self._lanes, self.file = lanes, file
        self._pages: list[StreamedPage] = []
        self._readers: dict[torch.device, _Readers] = {}
        self._holding = False
        # Told of the bytes of each copy to a device, and of the number of each page that is read after another one.
        self.watchers: list[Callable[[int], None]] = []
        self.turns: list[Callable[[int], None]] = []

    def page(self, layout: SlabLayout, device: torch.device) -> StreamedPage:
        """Return a new page of any content; device: where it will be read, or the CPU while that is not known."""
        home: PageHome = InMemory.plain(torch.empty(0, dtype=torch.uint8, device="cpu"))
        if self.file is not None:
            home = InFile(self.file, layout.nbytes)
        page = StreamedPage(self, len(self._pages), layout, home)
        self._pages.append(page)
        page._at(device)
        return page

    @property
    def nbytes(self) -> int:
        """How many bytes the pages take where they are at home."""
        return sum(page.layout.nbytes for page in self._pages)

    def page_bytes(self) -> list[int]:
        """Return how many bytes each page takes, by number."""
        return [page.layout.nbytes for page in self._pages]

    def held(self) -> list[Tensor]:
        """Return the memory that is held on devices, and of a plan's pages what `hold` has given them."""
        buffers = [slot.memory for readers in self._readers.values() for slot in readers.slots]
        return buffers + (self.homes() if self._holding else [])

    def homes(self) -> list[Tensor]:
        """Return what is held in host memory: the pages at home or, of pages in a file, what they come through."""
        staged = [slot.staging.bytes for each in self._readers.values() for slot in each.slots if slot.staging]
        return staged + [page.home.bytes for page in self._pages if isinstance(page.home, InMemory)]

    def hold(self) -> None:
        """Give pages without values the memory that they take where host and device are one: for a plan."""
        self._holding = True
        for page in self._pages:
            if isinstance(page.home, InMemory):
                page.home.bytes = page.home.bytes.contiguous()

    def move(self, page: StreamedPage, there: _Readers | None, device: torch.device) -> _Readers:
        """Have a page read on another device than before: one in memory goes where that device can copy from."""
        readers = self._readers.get(device)
        if readers is None:
            readers = _Readers(self._lanes(device), self.file is not None, self.watchers, self.turns)
            self._readers[device] = readers
        if isinstance(page.home, InMemory):
            page.home = readers.home_like(page.home, page.layout.nbytes)
        readers.pages[page.number] = page
        if there is not None:
            there.forget(page)
            del there.pages[page.number]
            if not there.pages:
                there.close()
                del self._readers[there.lanes.device]
        return readers

    def close(self) -> None:
        """Give up all memory, each piece after its last use; the pages are not used again."""
        for readers in self._readers.values():
            readers.close()
        self._readers.clear()
        for page in self._pages:
            if isinstance(page.home, InMemory):
                page.home = InMemory.plain(page.home.bytes.new_empty(0))
        if self.file is not None:
            self.file.close()

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in host memory and has no device yet, and nobody watches it."""
        return {
            "_lanes": self._lanes,
            "file": None,
            "_pages": self._pages,
            "_readers": {},
            "_holding": False,
            "watchers": [],
            "turns": [],
        }


class _Readers:
    """What reads pages on one device: its buffers, and in which order the pages were asked for so far."""

    def __init__(
        self, lanes: Lanes, staged: bool, watchers: list[Callable[[int], None]], turns: list[Callable[[int], None]]
    ) -> None:
        self.lanes, self._staged, self._watchers, self._turns = lanes, staged, watchers, turns
        self._memory = HostMemory(lanes)
        self.pages: dict[int, StreamedPage] = {}
        self.slots: list[PageSlot] = []
        # The last two pages asked for, and by the two before which page came then.
        self._last = NOTHING, NOTHING
        self._followed: dict[tuple[int, int], int] = {}

    def home_like(self, home: InMemory, nbytes: int) -> InMemory:
        """Return host memory for a page, with what is in another."""
        if self.lanes.device.type == "meta":
            return InMemory.plain(torch.empty((), dtype=torch.uint8, device="meta").expand(nbytes))
        made = self._memory.buffer(nbytes)
        home.settle()
        if home.bytes.numel() and not home.bytes.is_meta:
            made.bytes.copy_(home.bytes)
        return InMemory(made.bytes, made.last)

    def take(self, page: StreamedPage) -> PageSlot:
        """Return the buffer that has a page, for work queued on the current stream from now on; the next sets out."""
        if self.lanes.being_captured:
            raise InputError(
                "weights that are streamed cannot be read in the capture of a CUDA graph; keep them on the device, or "
                "capture nothing."
            )
        turned = page.number != self._last[1]
        slot = self._holding(page.number) or self._bring(page)
        slot.arrive()
        self.lanes.work.wait(slot.last.event)
        if turned:
            for turn in self._turns:
                turn(page.number)
            self._followed[self._last] = page.number
            self._last = self._last[1], page.number
            coming = self.pages.get(self._next())
            if coming is not None and self._holding(coming.number) is None:
                self._bring(coming)
        return slot

    def forget(self, page: StreamedPage) -> None:
        """Have a page come anew when it is next read."""
        slot = self._holding(page.number)
        if slot is not None:
            slot.page = None

    def close(self) -> None:
        """Give the buffers up after their last use."""
        for slot in self.slots:
            slot.give_back_memory()
        self.slots = []

    def _next(self) -> int:
        """Return the page that came after the last two when they were last asked for, or the next one in their way."""
        before, now = self._last
        onwards = now + (1 if before in (NOTHING, now) or before < now else -1)
        return self._followed.get(self._last, onwards)

    def _holding(self, number: int) -> PageSlot | None:
        page = self.pages.get(number)
        return next((slot for slot in self.slots if page is not None and slot.is_of(page)), None)

    def _bring(self, page: StreamedPage) -> PageSlot:
        slot = self._room_for(page)
        slot.page, slot.bytes = weakref.ref(page), slot.memory[: page.layout.nbytes]
        page.home.send(self.lanes, slot)
        for watch in self._watchers:
            watch(page.layout.nbytes)
        return slot

    def _room_for(self, page: StreamedPage) -> PageSlot:
        """Return a buffer that may be written over: never that of the page which was asked for last."""
        capacity = max(each.layout.nbytes for each in self.pages.values())
        if self.slots and self.slots[0].capacity < capacity:
            # A larger page has come to this device since.
            self.close()
        kept = self._holding(self._last[1])
        free = [slot for slot in self.slots if slot is not kept]
        if len(self.slots) < BUFFERS and not any(slot.idle for slot in free):
            self.slots.append(PageSlot(self.lanes, capacity, self._memory, self._staged))
            return self.slots[-1]
        return min(free, key=lambda slot: not slot.idle)
