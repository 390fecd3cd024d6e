"""Buffers have addresses of their own, bounds, and one program per byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .faults import PtxError
from .memory import Memory


def test_a_buffer_has_one_address_and_new_ones_start_aligned() -> None:
    """Asking twice gives the same address; buffers start at multiples of 256 bytes, with room between them."""
    memory, first, second = Memory(), np.zeros(3, np.float32), torch.zeros(5, dtype=torch.bfloat16)
    address = memory.address_of(first)
    assert address == memory.address_of(first)
    assert address % 256 == memory.address_of(second) % 256 == 0
    assert memory.address_of(second) >= address + first.nbytes + 256


def test_a_part_keeps_its_alignment_and_lies_inside_a_known_whole() -> None:
    """A slice alone is misaligned as it is within its array; a slice of a known buffer has an address in it."""
    values = torch.zeros(100)
    assert Memory().address_of(values[1:]) % 256 == 4
    assert Memory().address_of(np.zeros(100, np.float32)[1:]) % 256 == 4
    memory = Memory()
    whole = memory.address_of(values)
    assert memory.address_of(values[3:5]) == whole + 12
    empty = values[:0]
    assert memory.address_of(empty) != whole


def test_tables_of_host_addresses_are_translated() -> None:
    """Addresses of known buffers become virtual ones; counts and unknown addresses stay."""
    memory, known, unknown = Memory(), torch.zeros(4), torch.zeros(4)
    address = memory.address_of(known)
    table = torch.tensor([[known.data_ptr(), 4], [unknown.data_ptr(), 0]])
    assert memory.translated(table).tolist() == [[address, 4], [unknown.data_ptr(), 0]]
    assert table[0, 0] == known.data_ptr()


def test_overlapping_buffers_are_refused() -> None:
    """Two parts that share bytes cannot both be copied back."""
    memory, values = Memory(), np.zeros(100, np.float32)
    memory.address_of(values[:60])
    with pytest.raises(PtxError, match="overlap"):
        memory.address_of(values[50:])


def test_strided_buffers_are_refused() -> None:
    """Only contiguous memory has one address."""
    with pytest.raises(PtxError, match="contiguous"):
        Memory().address_of(np.zeros((4, 4))[:, 1])
    with pytest.raises(PtxError, match="contiguous"):
        Memory().address_of(torch.zeros(4, 4).T)


def test_every_dtype_goes_in_and_comes_back() -> None:
    """A launch sees the host's bytes, and the host sees what the launch wrote."""
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64):
        memory, values = Memory(), torch.tensor(1).to(dtype)
        place = memory.address_of(values) - memory.words(1)[1]
        memory.upload(track_programs=False)
        memory.words(1)[0][place : place + values.element_size()] = 0
        memory.download()
        assert values.item() == 0, dtype


def test_bounds_are_those_of_each_buffer() -> None:
    """The last byte is inside, the one behind it is not, and accesses may lie in several buffers at once."""
    memory, buffers = Memory(), [np.zeros(n, np.uint8) for n in (16, 7)]
    first, second = (memory.address_of(buffer) for buffer in buffers)
    assert memory.outside(np.array([first, first + 12]), 4) is None
    assert memory.outside(np.array([first, second, second + 3]), 4) is None
    assert memory.outside(np.array([first, second, second + 4]), 4) == 2
    assert memory.outside(np.array([0, first]), 1) == 0
    assert memory.describe(first + 16).startswith("0 bytes behind the end of buffer 0 (uint8[16])")
    assert memory.describe(5) == "address 0x5, before every buffer"


@pytest.mark.parametrize(
    ("steps", "races"),
    [
        ([(0, 0, True), (1, 4, True)], False),
        ([(0, 0, False), (1, 0, False)], False),
        ([(0, 0, False), (0, 0, True)], False),
        ([(0, 0, True), (1, 0, True)], True),
        ([(0, 0, True), (1, 3, False)], True),
        ([(0, 0, False), (1, 0, True)], True),
        ([(0, 0, False), (1, 0, False), (0, 0, True)], True),
    ],
    ids=["apart", "both read", "one program", "both write", "write then read", "read then write", "two readers"],
)
def test_two_programs_race_when_one_writes(steps: list[tuple[int, int, bool]], races: bool) -> None:
    """Each step is (program, byte offset, whether it writes) with four bytes."""
    memory, values = Memory(), np.zeros(16, np.uint8)
    start = memory.address_of(values)
    memory.upload(track_programs=True)
    found = [memory.note(np.array([start + at]), 4, np.array([who], np.int32), write) for who, at, write in steps]
    assert [race is not None for race in found] == [False] * (len(steps) - 1) + [races]


def test_two_programs_race_within_one_instruction() -> None:
    """Programs that run side by side may write one byte in the same instruction."""
    memory, values = Memory(), np.zeros(16, np.uint8)
    start = memory.address_of(values)
    memory.upload(track_programs=True)
    assert memory.note(np.array([start, start]), 4, np.array([0, 1], np.int32), True) is not None
