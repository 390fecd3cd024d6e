"""Copies beside other work: results do not depend on when they run, and device memory has a bound."""

from __future__ import annotations

import gc
import random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lisa_kernels.errors import InputError
from lisa_kernels.paging.host import HostPage, HostStore

from .late_device import ORDERINGS, LateLanes

CPU = torch.device("cpu")
N = 1000
SLOT = 1024
# Of pages: most fill a slot or less, one is larger by itself.
SIZES = (1024, 512, 1024, 1024, 2560)


class Paged(NamedTuple):
    """A page and the byte that fills it."""

    page: HostPage
    value: int


class Trainer:
    """Uses pages in any order, and expects of each what was last written to it."""

    def __init__(self, lanes: LateLanes, slot_bytes: int) -> None:
        self.lanes, self.slot_bytes = lanes, slot_bytes
        self.store = HostStore(lambda _: lanes)
        self.held = [self._new(number) for number in range(len(SIZES))]
        self.taken: set[int] = set()
        self.written = 0
        self.busiest = 0

    def _new(self, number: int) -> Paged:
        return Paged(self.store.page(f"page-{number}", SIZES[number], CPU, self.slot_bytes), 0)

    def take(self, number: int) -> None:
        """Bring a page, look at it, and write it anew."""
        page, value = self.held[number]
        slab = page.take()
        self.lanes.work.expect(slab, value)
        self.written = self.written % 255 + 1
        self.lanes.work.fill(slab, self.written)
        self.held[number] = Paged(page, self.written)
        self.taken.add(number)

    def prefetch(self, number: int) -> None:
        self.held[number].page.prefetch()

    def give_back(self, number: int) -> None:
        self.held[number].page.give_back()
        self.taken.discard(number)

    def free(self, number: int) -> None:
        self.held[number].page.free()
        self.held[number] = self._new(number)
        self.taken.discard(number)

    def lose(self, number: int) -> None:
        """Forget a page without a word, as what ends in an error does."""
        self.held[number] = self._new(number)
        self.taken.discard(number)

    def settle(self, number: int) -> None:
        """Read the page at home."""
        page, value = self.held[number]
        if number not in self.taken:
            page.settle()
            if not (page.home() == value).all():
                self.lanes.faults.append("another home")

    def other_work(self, number: int) -> None:
        """Write to memory that pages may have had before."""
        self.lanes.work.fill(self.lanes.empty(SIZES[number]), 255)

    def close(self) -> None:
        """End in the middle of everything."""
        self.held.clear()
        del self.store
        self.lanes.run_all()
        # What was in use when its owner went is among the youngest objects, unless a collection came in between.
        gc.collect(0)
        if self.lanes.locked or self.lanes.live_bytes:
            gc.collect()


ACTIONS = ["take", "prefetch", "give_back", "free", "lose", "settle", "other_work"]
# What steps do, a page fetched in vain whose home serves the next one, and anything.
HABITS = [
    ["prefetch", "take", "give_back"], ["take", "give_back"],
    ["take", "give_back", "prefetch", "free", "take", "give_back", "settle", "lose"],
]  # fmt: skip


def act(trainer: Trainer, action: str, number: int) -> None:
    getattr(trainer, action)(number)


def run(lanes: LateLanes, slot_bytes: int, seed: int, turns: int = 30) -> list[str]:
    """Return the faults of a run in any order."""
    trainer, order = Trainer(lanes, slot_bytes), random.Random(seed)
    for _ in range(turns):
        number = order.randrange(len(SIZES))
        for action in order.choice([*HABITS, [order.choice(ACTIONS)], [order.choice(ACTIONS)]]):
            act(trainer, action, number)
    trainer.close()
    return lanes.faults


PROGRAM = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, len(SIZES) - 1)), max_size=60)
MODE = st.none() | st.integers(0, 1000)


@settings(max_examples=150, deadline=None)
@given(PROGRAM, MODE, st.sampled_from([0, SLOT]))
def test_pages_are_what_was_written_in_every_order(
    program: list[tuple[str, int]], seed: int | None, slot_bytes: int
) -> None:
    """Whatever is asked for when, and whenever the device does it; nothing is left locked in the end."""
    lanes = LateLanes(seed)
    trainer = Trainer(lanes, slot_bytes)
    for action, number in program:
        act(trainer, action, number)
    trainer.close()
    assert lanes.faults == []
    assert not lanes.locked
    assert lanes.live_bytes == 0


@settings(max_examples=150, deadline=None)
@given(PROGRAM, MODE)
def test_a_ring_has_three_slots_or_what_is_taken_at_once_and_one_page_more(
    program: list[tuple[str, int]], seed: int | None
) -> None:
    """In every order of calls, and where pages are lost: the bound is one of bytes that torch's allocator has given."""
    lanes = LateLanes(seed)
    trainer = Trainer(lanes, SLOT)
    most = 3 * SLOT
    for action, number in program:
        if action == "other_work":
            continue
        most = max(most, sum(max(SIZES[other], SLOT) for other in {*trainer.taken, number}))
        act(trainer, action, number)
        assert lanes.live_bytes == trainer.store.device_bytes(CPU)
        assert lanes.peak_bytes <= most
        if lanes.live_bytes == 0:
            most = 3 * SLOT
            lanes.peak_bytes = 0


def test_what_is_needed_now_takes_the_room_of_what_is_not() -> None:
    """One page at a time is fetched beyond the ring's size; another that is taken meanwhile sends it back."""
    lanes = LateLanes()
    store = HostStore(lambda _: lanes)
    pages = [store.page(f"page-{number}", 4 * SLOT, CPU, SLOT) for number in range(3)]
    for page in pages:
        page.take()
        page.give_back()
    first, second, third = pages
    first.prefetch()
    second.prefetch()
    assert first.on_device
    assert not second.on_device
    third.take()
    assert not first.on_device
    assert lanes.live_bytes == 4 * SLOT


def test_the_slot_of_a_lost_page_is_not_written_while_it_is_used() -> None:
    """Its page is gone, and the work that was queued on it is not."""
    lanes = LateLanes()
    trainer = Trainer(lanes, SLOT)
    for number in (1, 0, 2, 3):
        trainer.take(number)
        if number == 1:
            trainer.give_back(number)
    trainer.lose(2)
    trainer.prefetch(1)
    assert lanes.live_bytes == 3 * SLOT
    while lanes.inwards.queued:
        lanes.inwards.run()
    trainer.take(1)
    trainer.close()
    assert lanes.faults == []


def test_a_step_holds_three_slots_and_nothing_afterwards() -> None:
    """The host far ahead of the device; one page, larger than a slot, takes the room of those that have left."""
    lanes = LateLanes()
    store = HostStore(lambda _: lanes)
    sizes = [2 * SLOT, *[SLOT] * 9, 2 * SLOT]
    pages = [store.page(f"page-{number}", nbytes, CPU, SLOT) for number, nbytes in enumerate(sizes)]
    for _ in range(3):
        lanes.peak_bytes = 0
        for page, following in zip(pages, [*pages[1:], None]):
            page.take()
            if following is not None:
                following.prefetch()
            page.give_back()
        assert lanes.live_bytes == 0
    assert lanes.peak_bytes == 3 * SLOT


# The latest device and some at random, with slots of their own and in a ring.
RUNS = [(mode, slot_bytes, turn) for turn in range(20) for mode in (None, turn) for slot_bytes in (0, SLOT)]


def test_runs_in_any_order_have_no_fault() -> None:
    assert not any(run(LateLanes(mode), slot_bytes, turn) for mode, slot_bytes, turn in RUNS)


@pytest.mark.parametrize("name", ORDERINGS)
def test_every_ordering_is_needed(name: str) -> None:
    """Negative control: with any one of the waits left out, the same runs have faults."""
    assert any(run(LateLanes(mode, {ORDERINGS[name]}), slot_bytes, turn) for mode, slot_bytes, turn in RUNS)


def test_memory_of_a_late_device_outlives_its_pages_and_nothing_waits() -> None:
    """All of it goes while copies are queued: the host's memory stays locked until they are over."""
    lanes = LateLanes()
    store = HostStore(lambda _: lanes)
    page = store.page("page", N, CPU)
    lanes.work.fill(page.take(), 7)
    page.give_back()
    page.prefetch()
    del page, store
    assert lanes.locked
    assert lanes.live_bytes == N
    gc.collect(0)
    assert lanes.locked
    lanes.run_all()
    gc.collect(0)
    assert not lanes.locked
    assert lanes.live_bytes == 0
    assert lanes.faults == []


def test_nothing_is_unlocked_while_a_graph_is_captured() -> None:
    """The driver would end the capture; even an event must not be asked for."""
    lanes = LateLanes()
    store = HostStore(lambda _: lanes)
    page = store.page("page", N, CPU)
    page.take()
    page.give_back()
    lanes.run_all()
    lanes.capturing = True
    del page, store
    gc.collect(0)
    assert lanes.locked
    lanes.capturing = False
    gc.collect(0)
    assert not lanes.locked


def test_each_device_waits_for_its_own() -> None:
    """The other one's work may go on for ever."""
    devices = {device: LateLanes(device=device) for device in (torch.device("cpu", 0), torch.device("cpu", 1))}
    store = HostStore(lambda device: devices[device])
    pages = {device: store.page("page", N, device) for device in devices}
    for page in pages.values():
        page.take()
        page.give_back()
    one, other = devices.values()
    one.run_all()
    del store, pages, page
    gc.collect(0)
    assert not one.locked
    assert other.locked
    assert other.outwards.queued
    other.run_all()
    gc.collect(0)
    assert not other.locked


def test_closing_waits_for_the_last_copies() -> None:
    lanes = LateLanes()
    store = HostStore(lambda _: lanes)
    page = store.page("page", N, CPU)
    page.take()
    page.give_back()
    page.free()
    assert store.nbytes == N
    store.close()
    assert store.nbytes == 0
    assert not lanes.locked


def test_a_page_that_never_leaves_the_device_takes_no_host_memory() -> None:
    store = HostStore()
    store.page("stays", N, CPU).take().fill_(1)
    assert store.nbytes == 0


def test_memory_that_is_not_there_is_refused_and_the_slab_stays_on_the_device() -> None:
    store = HostStore()
    page = store.page("large", 1 << 60, torch.device("meta"))
    page.take()
    real = store.page("real", N, CPU)
    real.take().fill_(3)
    real.nbytes = 1 << 60
    with pytest.raises(InputError, match=r"no 1152921504606846976 bytes left.*file:DIR"):
        real.give_back()
    assert (real.take() == 3).all()
    assert store.nbytes == 0


def test_pages_of_a_planned_run_have_sizes_only() -> None:
    page = HostStore().page("planned", N, torch.device("meta"))
    assert page.take().is_meta
    page.give_back()
    page.prefetch()
    assert page.take().numel() == N
