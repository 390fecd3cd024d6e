"""Copies beside other work: results do not depend on when they run, as long as they run when they are waited for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.paging import host
from lisa_kernels.paging.host import CopyLane, HostPage, HostStore

CPU = torch.device("cpu")
N = 1000


class Copy:
    """A copy that runs when it is waited for, and all copies before it on its lane."""

    def __init__(self, lane: LateLane, target: Tensor, source: Tensor, after: Copy | None) -> None:
        self.lane, self.target, self.source, self.after = lane, target, source, after

    def synchronize(self) -> None:
        self.lane.run_until(self)


class LateLane(CopyLane):
    """The slowest stream there can be."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.queue: list[Copy] = []

    def copy_(self, target: Tensor, source: Tensor, after: Any = None) -> Any:
        self.queue.append(Copy(self, target, source, after))
        return self.queue[-1]

    def wait(self, copied: Any) -> None:
        if copied is not None:
            copied.synchronize()

    def run_until(self, last: Copy) -> None:
        while last in self.queue:
            copy = self.queue.pop(0)
            if copy.after is not None:
                copy.after.synchronize()
            copy.target.copy_(copy.source)


class LateStore(HostStore):
    """A host store whose copies all run as late as they may."""

    def __init__(self) -> None:
        super().__init__()
        self.inwards, self.outwards = LateLane(), LateLane()

    def lanes(self, device: torch.device) -> tuple[CopyLane, CopyLane]:
        return self.inwards, self.outwards


def written(store: HostStore, value: int) -> HostPage:
    page = store.page("page", N, CPU)
    page.take().fill_(value)
    page.give_back()
    return page


def test_a_page_is_read_after_it_was_written_however_late() -> None:
    store = LateStore()
    page = written(store, 7)
    page.prefetch()
    assert store.inwards.queue
    assert store.outwards.queue
    assert (page.take() == 7).all()


def test_home_is_right_once_it_is_settled() -> None:
    """Negative control: before, it is not."""
    page = written(LateStore(), 7)
    page.home().zero_()
    assert not (page.home() == 7).any()
    page.settle()
    assert (page.home() == 7).all()


def test_a_buffer_that_is_still_read_is_not_written_by_its_next_page() -> None:
    """A page is freed right after it was taken, or only prefetched, and its buffer goes to another page."""
    for taken in (False, True):
        store = LateStore()
        page = written(store, 7)
        page.prefetch()
        slab = page._slab
        if taken:
            page.take()
        page.free()
        other = written(store, 9)
        other.settle()
        assert slab is not None
        assert (slab == 7).all()
        assert store.nbytes == N


def test_a_buffer_that_is_still_written_serves_its_next_page() -> None:
    store = LateStore()
    written(store, 7).free()
    other = written(store, 9)
    other.settle()
    assert (other.home() == 9).all()
    assert (other.take() == 9).all()


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


class Runtime:
    """Counts what is locked, as CUDA's runtime would."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.locked: dict[int, int] = {}
        self.waited: list[int] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.locked[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802
        del self.locked[address]


def test_locked_buffers_are_of_whole_pieces_of_their_own_and_are_unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: runtime.waited.append(len(runtime.locked)))
    sizes = (1, 4095, 4096, 4097, 100_000)
    buffers = [host._locked(size) for size in sizes]
    assert [buffer.numel() for buffer in buffers] == list(sizes)
    ranges = sorted((address, address + size) for address, size in runtime.locked.items())
    assert all(begin % host.LOCKED_PIECE == 0 and end % host.LOCKED_PIECE == 0 for begin, end in ranges)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))
    for buffer in buffers:
        address = buffer.data_ptr()
        assert any(begin <= address and address + buffer.numel() <= end for begin, end in ranges)
    del buffer, buffers
    assert not runtime.locked
    # Before each one, for a copy may still be on its way to it.
    assert runtime.waited == [5, 4, 3, 2, 1]


def test_memory_that_cannot_be_locked_is_used_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(error=2))
    with pytest.warns(UserWarning, match="cannot be locked"):
        assert host._locked(N).numel() == N


def test_pages_of_a_planned_run_have_sizes_only() -> None:
    page = HostStore().page("planned", N, torch.device("meta"))
    assert page.take().is_meta
    page.give_back()
    page.prefetch()
    assert page.take().numel() == N
