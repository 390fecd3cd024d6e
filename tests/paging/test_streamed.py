"""Pages that are read in turns: whatever is asked for when, what is read is what was last written, in two buffers."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Sequence

import pytest
import torch

from lisa_kernels.errors import InputError
from lisa_kernels.paging import Entry, SlabLayout
from lisa_kernels.paging.page_file import PageFile
from lisa_kernels.paging.queues import Lanes
from lisa_kernels.paging.streamed import StreamedPage, StreamedPages

from .late_device import LateLanes

CPU = torch.device("cpu")
SIZES = (1024, 700, 1024, 40, 1000, 1024)
TURNS = 60
# Who must wait, and for whom: a copy for the last reader of its buffer and the last writer of its page, a reader for
# its copy, a writer for the copies of what it writes over.
ORDERINGS = {"copies-wait-for-work": ("in", "work"), "work-waits-for-copies": ("work", "in")}


class Reader:
    """Reads and writes pages in any order, and expects of each what was last written to it."""

    def __init__(self, lanes: LateLanes, file: PageFile | None = None) -> None:
        self.lanes = lanes
        self.pages = StreamedPages(lambda _: lanes, file)
        self.held = [self.pages.page(layout(size), CPU) for size in SIZES]
        self.values = [0] * len(SIZES)
        for number in range(len(SIZES)):
            self.write(number)

    def write(self, number: int) -> None:
        """Write to both tensors of a page, of which the second is done in two parts."""
        self.values[number] = self.values[number] % 255 + 1
        size = SIZES[number]
        for name, first, count in (("codes", 0, size), ("absmax", 0, 4), ("absmax", 4, size // 4 - 4)):
            itemsize = 1 if name == "codes" else 4
            content = self.lanes.empty(count * itemsize)
            self.lanes.work.fill(content, self.values[number])
            self.held[number].write(name, first, content if itemsize == 1 else content.view(torch.float32))

    def read(self, number: int) -> None:
        with self.held[number].lent(CPU) as parts:
            for part in parts.values():
                self.lanes.work.expect(part.view(torch.uint8), self.values[number])

    def other_work(self, number: int) -> None:
        """Write to memory that buffers may have had before."""
        self.lanes.work.fill(self.lanes.empty(2048), 255)


def layout(size: int) -> SlabLayout:
    return SlabLayout([Entry("codes", (size,), torch.uint8), Entry("absmax", (size // 4,), torch.float32)])


def is_right(lanes: LateLanes, choices: random.Random, file: PageFile | None = None) -> bool:
    reader = Reader(lanes, file)
    for turn in range(TURNS):
        number = turn % len(SIZES) if choices.random() < 0.7 else choices.randrange(len(SIZES))
        getattr(reader, choices.choice(["read", "read", "read", "write", "other_work"]))(number)
    assert len(reader.pages.held()) == 2
    reader.pages.close()
    assert not reader.pages.held()
    lanes.run_all()
    return not lanes.faults


def seeds() -> list[int | None]:
    return [None, *range(20)]


def test_what_is_read_is_what_was_written_last() -> None:
    """On a device that does nothing before it must, and on one that does it at random."""
    assert all(is_right(LateLanes(seed), random.Random(seed)) for seed in seeds())


@pytest.mark.parametrize("name", ORDERINGS)
def test_every_ordering_is_needed(name: str) -> None:
    """Negative control: with the waits of one queue for the other left out, some of the same runs are wrong."""
    forgotten = {ORDERINGS[name]}
    assert not all(is_right(LateLanes(seed, forgotten), random.Random(seed)) for seed in seeds())


def test_the_host_waits_for_nothing() -> None:
    """Neither to read, nor to write, nor to give the buffers up."""
    lanes = LateLanes()
    reader = Reader(lanes)
    for number in (0, 1, 2, 3, 2, 1, 0):
        reader.read(number)
        reader.write(number)
    reader.pages.close()
    # A device that runs when it is waited for has done nothing.
    assert len(lanes.work.queued) > 30
    lanes.run_all()
    assert not lanes.faults


def copied(pages: StreamedPages, held: Sequence[StreamedPage], order: Sequence[int]) -> list[int]:
    """Return how many bytes set out for the device at each of these reads."""
    found = []
    for number in order:
        before: list[int] = []
        pages.watchers.append(before.append)
        with held[number].lent(CPU):
            pass
        pages.watchers.pop()
        found.append(sum(before))
    return found


def test_the_next_page_sets_out_when_one_is_read() -> None:
    """Upwards and downwards; what comes after the ends is known once it has come."""
    pages = StreamedPages()
    one, held = layout(1024).nbytes, [pages.page(layout(1024), CPU) for _ in range(5)]
    there_and_back = [0, 1, 2, 3, 4, 3, 2, 1, 0]
    assert copied(pages, held, [0, 0, 1, 2, 3, 4]) == [2 * one, 0, one, one, one, 0]
    assert copied(pages, held, [3, 3, 2, 1, 0]) == [one, 0, one, one, 0]
    assert copied(pages, held, there_and_back[1:]) == [one, one, one, 0, one, one, one, 0]
    # A backward that ends early, at first and when that is known.
    early = [0, 1, 2, 3, 4, 3, 2]
    assert copied(pages, held, early[1:]) == [one, one, one, 0, one, one]
    assert copied(pages, held, early) == [one, 2 * one, one, one, 0, one, one]
    assert copied(pages, held, early) == [one, one, one, one, 0, one, one]
    # Forwards alone.
    forwards = copied(pages, held, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0])
    assert forwards == [one, one, one, one, 0, one, 2 * one, one, one, one, one]


def test_a_single_page_comes_once_and_takes_one_buffer() -> None:
    pages = StreamedPages()
    held = [pages.page(layout(1024), CPU)]
    assert copied(pages, held, [0, 0, 0]) == [layout(1024).nbytes, 0, 0]
    assert [buffer.numel() for buffer in pages.held()] == [layout(1024).nbytes] == [pages.nbytes]


def test_copies_have_memory_of_their_own() -> None:
    """deepcopy and a pickle are of the moment when they were made, and are written to by themselves."""
    pages = StreamedPages()
    held = [pages.page(layout(1024), CPU) for _ in range(3)]
    for number, page in enumerate(held):
        page.write("codes", 0, torch.full((1024,), number, dtype=torch.uint8))
    copies = [copy.deepcopy(held), pickle.loads(pickle.dumps(held))]
    for page in held:
        page.write("codes", 0, torch.full((1024,), 9, dtype=torch.uint8))
    for each in copies:
        each[1].write("codes", 0, torch.full((1024,), 7, dtype=torch.uint8))
        assert each[0]._pages is each[1]._pages is not pages
        for page, value in zip((*each, *held), (0, 7, 2, 9, 9, 9)):
            with page.lent(CPU) as parts:
                assert (parts["codes"] == value).all()


def test_pages_that_move_leave_nothing_behind() -> None:
    """As a model that is attached on the CPU and moved to a GPU then."""
    here, there = torch.device("cpu"), torch.device("meta")
    pages = StreamedPages()
    held = [pages.page(layout(size), here) for size in SIZES[:3]]
    copied(pages, held, [0, 1])
    assert {buffer.device for buffer in pages.held()} == {here}
    for page in held:
        with page.lent(there) as parts:
            assert parts["codes"].device == there
    assert {buffer.device for buffer in pages.held()} == {there}


def test_a_capture_is_refused() -> None:
    """A replay would read what the buffers hold by then."""
    lanes = LateLanes()
    reader = Reader(lanes)
    lanes.capturing = True
    with pytest.raises(InputError, match="in the capture of a CUDA graph; keep them on the device"):
        reader.read(0)
    assert Lanes(CPU).being_captured is False
