"""States in pages: in every order of copies and work the bits of resident ones, within a bound, and nothing waits."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from paging.late_device import ORDERINGS
from torch import Tensor, nn

from device.simulated import Note, Order, allocations, driver, noted_faults, set_order, waits
from lisa_kernels import AdamW8bit
from lisa_kernels.optim import paged
from lisa_kernels.paging import host, queues
from lisa_kernels.paging.managed import ManagedMemory

SHAPES = [(64, 80), (5, 7), (300,), (70, 70), (80, 64), (9,), (65, 65), (64, 64), (128, 64)]
PAGE_BYTES = 1 << 14
DEVICE = torch.device("cuda", 0)
# Of pages: most fill a slot or less, one is larger by itself.
SLOT, SIZES = 1024, (1024, 512, 1024, 1024, 2560)
TURNS = 30
ACTIONS = ["take", "prefetch", "give_back", "free", "lose", "settle", "other_work"]
# What steps do, and a page fetched in vain whose home serves the next one.
HABITS = [
    ["prefetch", "take", "give_back"], ["take", "give_back"],
    ["take", "give_back", "prefetch", "free", "take", "give_back", "settle", "lose"],
]  # fmt: skip
# Bytes of a step's tables and numbers.
SMALL = 1 << 16
STORES = ["host", "managed", "file"]


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pages of what is little state."""
    monkeypatch.setattr(paged, "PAGE_BYTES", PAGE_BYTES)


def gradient(shape: tuple[int, ...], seed: int, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)


def states(paging: str | None, device: str, steps: int = 4) -> tuple[list[Tensor], dict[Any, Tensor], list[Note]]:
    """Return weights and states after some steps, in each of which some rest, and what the last one waited for."""
    params = [nn.Parameter(gradient(shape, number, device)) for number, shape in enumerate(SHAPES)]
    opt = AdamW8bit(params, lr=1e-2, seed=3, paging=paging, max_grad_norm=1.0)
    for step in range(steps):
        for number, param in enumerate(params):
            rests = (number + step) % 4 == 0
            param.grad = None if rests else gradient(param.shape, 10 * step + number, device)
        with waits() as last_waits:
            opt.step()
    saved = opt.state_dict()["state"]
    held = {(number, name): value.cpu().clone() for number, state in saved.items() for name, value in state.items()}
    return [param.detach().cpu() for param in params], held, last_waits


def same(one: Any, other: Any) -> bool:
    weights = all(torch.equal(a, b) for a, b in zip(one[0], other[0]))
    return weights and all(torch.equal(value, other[1][key]) for key, value in one[1].items())


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("store", STORES)
def test_paged_bits_are_resident_ones(store: str, device: str, tmp_path: Path) -> None:
    """With cuda:0 current; and once the first steps have made what is kept, no step waits for the device."""
    found = states(f"file:{tmp_path}" if store == "file" else store, device)
    assert same(states(None, device), found)
    assert torch.cuda.current_device() == 0
    if store == "host":
        assert not found[2]


class NamedEvent:
    """An event of a queue with a name; the host may leave out to wait for it."""

    def __init__(self, event: Any, queue: str, forgotten: tuple[str, str] | None) -> None:
        self.event, self.queue, self._forgotten = event, queue, forgotten

    def query(self) -> bool:
        return bool(self.event.query())

    def synchronize(self) -> None:
        if ("host", self.queue) != self._forgotten:
            self.event.synchronize()


class NamedQueue(queues.StreamQueue):
    """A stream that may leave out its waits for one of the others."""

    def __init__(self, stream: torch.cuda.Stream, name: str, forgotten: tuple[str, str] | None) -> None:
        super().__init__(stream)
        self._name, self._forgotten = name, forgotten

    def wait(self, event: Any) -> None:
        if event is not None and (self._name, event.queue) != self._forgotten:
            super().wait(event.event)

    def record(self) -> NamedEvent:
        return NamedEvent(super().record(), self._name, self._forgotten)


class NamedLanes(queues.Lanes):
    """The lanes of a device; `forgotten` names the waiting and the other queue of waits that are left out."""

    def __init__(self, device: torch.device, forgotten: tuple[str, str] | None = None) -> None:
        super().__init__(device)
        self._forgotten = forgotten
        self.inwards = NamedQueue(torch.cuda.Stream(device), "in", forgotten)
        self.outwards = NamedQueue(torch.cuda.Stream(device), "out", forgotten)

    @property
    def work(self) -> NamedQueue:
        return NamedQueue(torch.cuda.current_stream(self.device), "work", self._forgotten)


class Trainer:
    """Uses pages in any order and keeps what it saw of each beside what was last written to it."""

    def __init__(self, store: host.HostStore, slot_bytes: int) -> None:
        self.store, self.slot_bytes = store, slot_bytes
        self.pages = [self._new(number) for number in range(len(SIZES))]
        self.values = [0] * len(SIZES)
        self.written = 0
        self.taken: set[int] = set()
        self.seen: list[tuple[Tensor, int]] = []

    def _new(self, number: int) -> host.HostPage:
        return self.store.page(f"page-{number}", SIZES[number], DEVICE, self.slot_bytes)

    def take(self, number: int) -> None:
        slab = self.pages[number].take()
        self.seen.append((slab.clone(), self.values[number]))
        self.written = self.values[number] = self.written % 255 + 1
        slab.fill_(self.written)
        self.taken.add(number)

    def prefetch(self, number: int) -> None:
        self.pages[number].prefetch()

    def give_back(self, number: int) -> None:
        self.pages[number].give_back()
        self.taken.discard(number)

    def free(self, number: int) -> None:
        self.pages[number].free()
        self.pages[number], self.values[number] = self._new(number), 0
        self.taken.discard(number)

    def lose(self, number: int) -> None:
        """Forget a page without a word, as what ends in an error does."""
        self.pages[number], self.values[number] = self._new(number), 0
        self.taken.discard(number)

    def settle(self, number: int) -> None:
        if number not in self.taken:
            self.pages[number].settle()
            self.seen.append((self.pages[number].home().clone(), self.values[number]))

    def other_work(self, number: int) -> None:
        """Write to memory that pages may have had before."""
        torch.empty(SIZES[number], dtype=torch.uint8, device=DEVICE).fill_(255)


def is_right(forgotten: tuple[str, str] | None, slot_bytes: int, seed: int) -> bool:
    """Run pages through everything that may happen to them; whether all that was seen is what was written."""
    trainer, choices = Trainer(host.HostStore(lambda device: NamedLanes(device, forgotten)), slot_bytes), Random(seed)
    with noted_faults() as noted:
        for _ in range(TURNS):
            number = choices.randrange(len(SIZES))
            for action in choices.choice([*HABITS, [choices.choice(ACTIONS)], [choices.choice(ACTIONS)]]):
                getattr(trainer, action)(number)
        right = all(bool((seen == value).all()) for seen, value in trainer.seen)
    return right and not noted


RUNS = [
    (order, slot_bytes, seed) for seed in range(12) for order in (Order.LATE, Order.RANDOM) for slot_bytes in (0, SLOT)
]


def runs(forgotten: tuple[str, str] | None) -> Iterator[bool]:
    for order, slot_bytes, seed in RUNS:
        set_order(order, seed)
        yield is_right(forgotten, slot_bytes, seed)


@pytest.mark.order("late")
def test_pages_are_what_was_written_in_every_order() -> None:
    """Whatever happens to them when, and whenever the device does it."""
    assert all(runs(None))


@pytest.mark.order("late")
@pytest.mark.parametrize("name", ORDERINGS)
def test_every_ordering_is_needed(name: str) -> None:
    """Negative control: with any one of the waits left out, some of the same runs are wrong."""
    assert not all(runs(ORDERINGS[name]))


@pytest.mark.order("eager", "late", "random")
def test_memory_has_a_bound_however_late_the_device_is(order: Order) -> None:
    """A step holds no more than three pages beside weights and gradients, and the host waits for none of them.

    A random device may be later in the last step than it was before: small locked buffers of copies are asked for then.
    """
    params = [nn.Parameter(torch.zeros(64, 128, device="cuda")) for _ in range(24)]
    opt = AdamW8bit(params, lr=1e-3, paging="host")
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        asked = allocations()
        with waits() as noted:
            opt.step()
        page = max(param.numel() * 2 * 1.02 for param in params)
        assert torch.cuda.max_memory_allocated() - before <= 3 * page + SMALL
    assert not noted
    assert allocations() == asked or order is Order.RANDOM


@pytest.mark.order("late")
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_page_that_dies_under_its_copy_stays_locked_until_it_is_over(device: str) -> None:
    """With cuda:0 current, whose work says nothing of the other device's."""
    param = nn.Parameter(torch.randn(128, 256, device=device))
    param.grad = torch.randn_like(param)
    opt = AdamW8bit([param], lr=1e-3, paging="host")
    opt.step()
    locked = driver.sim_locked_bytes()
    with noted_faults() as noted:
        del opt, param
        gc.collect()
    assert not noted
    gc.collect()
    assert driver.sim_locked_bytes() < locked


@pytest.mark.order("late")
def test_unified_memory_dies_while_its_device_and_another_have_work() -> None:
    """Its own device is waited for, and no other."""
    slab = ManagedMemory(torch.device("cuda", 0)).empty(SLOT)
    slab.fill_(1)
    other = torch.zeros(SLOT, device="cuda:1")
    with waits() as noted:
        del slab
    assert [note.what for note in noted] == ["cudaDeviceSynchronize"]
    assert other.tolist() == [0] * SLOT


def test_memory_that_cannot_be_locked_warns_once_and_the_bits_are_the_same() -> None:
    """Copies of pages then wait for one another."""
    resident = states(None, "cuda")
    torch.ones(1 << 16).pin_memory()
    driver.sim_set_lock_limit(driver.sim_locked_bytes() + 2 * PAGE_BYTES)
    try:
        with pytest.warns(UserWarning, match="cannot be locked"):
            found = states("host", "cuda")
    finally:
        driver.sim_set_lock_limit(-1)
    assert same(resident, found)
