"""Which orders of shared accesses are races, and what was never written."""

from __future__ import annotations

import numpy as np
import pytest

from .shared_memory import SharedMemory


def write(memory: SharedMemory, warp: int, value: int) -> bool:
    """Write a byte as a warp and return whether that races."""
    return memory.note_write(np.array([0]), np.array([[value]], np.uint8), np.array([warp], np.int32)) is not None


def read(memory: SharedMemory, warp: int) -> bool:
    return memory.note_read(np.array([0]), 1, np.array([warp], np.int32)) is not None


@pytest.mark.parametrize(
    ("accesses", "races"),
    [
        *((order, False) for order in ("w0 r0", "w0 w0", "r0 r1", "w0 | r1", "r0 | w1", "w0 | w1")),
        *((order, True) for order in ("w0 r1", "r0 w1", "w0 w1", "r0 r1 w0")),
    ],
)
def test_warps_race_unless_a_barrier_stands_between(accesses: str, races: bool) -> None:
    """`w0` is a write by warp 0, `r1` a read by warp 1, `|` a barrier; only the last access may race."""
    memory, raced = SharedMemory(1, 16), [False]
    for number, access in enumerate(accesses.split()):
        if access == "|":
            memory.barrier(np.array([True]))
        else:
            warp = int(access[1])
            raced.append(write(memory, warp, number) if access[0] == "w" else read(memory, warp))
    assert raced == [False] * (len(raced) - 1) + [races]


def test_two_warps_in_one_instruction_may_store_the_same_value_only() -> None:
    """A value that a layout repeats over warps is stored by each of them."""
    place, warps = np.array([0, 0]), np.array([0, 1], np.int32)
    assert SharedMemory(1, 16).note_write(place, np.array([[7], [7]], np.uint8), warps) is None
    assert SharedMemory(1, 16).note_write(place, np.array([[7], [8]], np.uint8), warps) is not None


def test_unwritten_bytes_are_found_and_programs_are_apart() -> None:
    """What one program writes is unwritten for the next."""
    memory = SharedMemory(2, 10)
    program, address = np.array([0, 1]), np.array([4, 4])
    place = memory.place(program, address)
    memory.note_write(place[:1], np.array([[1, 2]], np.uint8), np.array([0], np.int32))
    assert memory.unwritten(place[:1], 2) is None
    assert memory.unwritten(place, 2) == 1
    assert memory.unwritten(place[:1], 4) == 0


def test_a_barrier_orders_only_its_programs() -> None:
    """A barrier of the second program leaves the first one's accesses unordered."""
    memory = SharedMemory(2, 16)
    write(memory, 0, 1)
    memory.barrier(np.array([False, True]))
    assert read(memory, 1)
