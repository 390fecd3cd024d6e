"""Host memory that is locked: in pieces of its own, and told where it cannot be."""

from __future__ import annotations

import sys
import warnings
from itertools import pairwise

import pytest

from lisa_kernels.paging.locked import LOCKED_PIECE, HostMemory, locked_memory_limit

from .late_device import LateLanes

N = 1000


class FullLanes(LateLanes):
    """A machine that locks no more than so much."""

    most = 0

    def lock(self, address: int, nbytes: int) -> int:
        return super().lock(address, nbytes) if sum(self.locked.values()) + nbytes <= self.most else 2


def test_locked_buffers_are_of_whole_pieces_of_their_own_and_are_unlocked() -> None:
    lanes = LateLanes()
    memory = HostMemory(lanes)
    sizes = (1, 4095, 4096, 4097, 100_000)
    buffers = [memory.buffer(size).bytes for size in sizes]
    assert [buffer.numel() for buffer in buffers] == list(sizes)
    ranges = sorted((address, address + size) for address, size in lanes.locked.items())
    assert all(begin % LOCKED_PIECE == 0 and end % LOCKED_PIECE == 0 for begin, end in ranges)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))
    for buffer in buffers:
        address = buffer.data_ptr()
        assert any(begin <= address and address + buffer.numel() <= end for begin, end in ranges)
    # Whoever reads a buffer holds its memory.
    read = buffers[0].numpy()
    del buffer, buffers
    assert len(lanes.locked) == 1
    del read
    assert not lanes.locked


def test_memory_that_cannot_be_locked_is_used_and_said_once() -> None:
    """With what is locked already, and how to have more."""
    lanes = FullLanes()
    lanes.most = 3 * LOCKED_PIECE
    memory = HostMemory(lanes)
    first = memory.buffer(2 * LOCKED_PIECE)
    with pytest.warns(UserWarning, match="8192 bytes of host memory cannot be locked beside 8192 .*error 2") as said:
        assert memory.buffer(2 * LOCKED_PIECE).bytes.numel() == 2 * LOCKED_PIECE
    assert locked_memory_limit() in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.buffer(2 * LOCKED_PIECE)
        # A smaller one still fits.
        second = memory.buffer(N)
    assert len(lanes.locked) == 2
    del first, second
    assert not lanes.locked


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_the_limit_that_is_named_is_the_processs(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    assert "65536 bytes" in locked_memory_limit()
    assert "ulimit -l" in locked_memory_limit()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert "no limit" in locked_memory_limit()
