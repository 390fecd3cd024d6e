"""The model of torch's CUDA allocator: cases worked out by hand, and laws for any sequence."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lisa_kernels.plan.allocator import BLOCK, MIB, CachingAllocator, DeviceFullError, Reserve, replay

from .traces import sizes

FIXED: dict[str, tuple[list[tuple[int, int]], Reserve]] = {
    # A byte takes a block of 512 in a segment of 2 MiB.
    "one byte": ([(1, 1)], Reserve(1, 512, 2 * MIB, 0)),
    # 1 MiB is still small: two fill a segment, the third opens another.
    "three of 1 MiB": ([(1, MIB), (2, MIB), (3, MIB)], Reserve(3 * MIB, 3 * MIB, 4 * MIB, 0)),
    # Small and large live apart.
    "1 MiB and a byte more": ([(1, MIB), (2, MIB + 1)], Reserve(2 * MIB + 1, 2 * MIB + BLOCK, 22 * MIB, 0)),
    # From 10 MiB a block has a segment of its own, rounded up to 2 MiB; the 1 MiB left over is not split off.
    "11 MiB": ([(1, 11 * MIB)], Reserve(11 * MIB, 12 * MIB, 12 * MIB, 0)),
    # Below, four of 5 MiB share 20 MiB.
    "four of 5 MiB": ([(1, 5 * MIB), (2, 5 * MIB), (3, 5 * MIB), (4, 5 * MIB)],
                      Reserve(20 * MIB, 20 * MIB, 20 * MIB, 0)),
    # 9 of 20 MiB: 11 are split off, then 9 of those; 2 MiB remain.
    "two of 9 MiB": ([(1, 9 * MIB), (2, 9 * MIB)], Reserve(18 * MIB, 18 * MIB, 20 * MIB, 0)),
    # Two freed neighbours make room for both sizes together.
    "coalesced": ([(1, 8 * MIB), (2, 8 * MIB), (3, 4 * MIB), (1, -1), (2, -1), (4, 16 * MIB)],
                  Reserve(20 * MIB, 20 * MIB, 20 * MIB, 0)),
    # Freed apart they do not: fragments of 8 and 4 MiB hold no 12.
    "fragmented": ([(1, 8 * MIB), (2, 8 * MIB), (3, 4 * MIB), (1, -1), (3, -1), (4, 12 * MIB)],
                   Reserve(20 * MIB, 20 * MIB, 32 * MIB, 0)),
    # The smallest free block that holds 12 MiB is that of 14, and 14 then finds that of 40.
    "best fit": ([(1, 40 * MIB), (2, 14 * MIB), (1, -1), (2, -1), (3, 12 * MIB), (4, 14 * MIB)],
                 Reserve(54 * MIB, 54 * MIB, 54 * MIB, 0)),
    "nothing": ([(1, 0)], Reserve(0, 0, 0, 0)),
}  # fmt: skip
EXPANDABLE: dict[str, tuple[list[tuple[int, int]], Reserve]] = {
    # The segment of large blocks grows by pages of 20 MiB, and what is left of a page serves the next block.
    "11 MiB": ([(1, 11 * MIB)], Reserve(11 * MIB, 11 * MIB, 20 * MIB, 0)),
    "21 and 19 MiB": ([(1, 21 * MIB), (2, 19 * MIB)], Reserve(40 * MIB, 40 * MIB, 40 * MIB, 0)),
    # A free end grows by what is missing: 20 are there, one page more makes 40.
    "grown end": ([(1, 20 * MIB), (1, -1), (2, 40 * MIB)], Reserve(40 * MIB, 40 * MIB, 40 * MIB, 0)),
    # The end is taken last: 5 MiB go into the larger hole left by 16.
    "end taken last": ([(1, 16 * MIB), (2, 16 * MIB), (1, -1), (3, 5 * MIB), (4, 8 * MIB)],
                       Reserve(32 * MIB, 32 * MIB, 40 * MIB, 0)),
    "small": ([(1, MIB), (2, 2048)], Reserve(MIB + 2048, MIB + 2048, 2 * MIB, 0)),
}  # fmt: skip


@pytest.mark.parametrize("case", FIXED)
def test_fixed_segments_worked_by_hand(case: str) -> None:
    changes, expected = FIXED[case]
    assert replay(sizes(*changes)) == expected


@pytest.mark.parametrize("case", EXPANDABLE)
def test_expandable_segments_worked_by_hand(case: str) -> None:
    changes, expected = EXPANDABLE[case]
    assert replay(sizes(*changes), expandable=True) == expected


def test_whole_segments_are_given_back_before_an_allocation_fails() -> None:
    """12 + 40 MiB were cached; within 60 they make room for 50, and 30 beside 50 do not fit."""
    changes = [(1, 12 * MIB), (2, 40 * MIB), (1, -1), (2, -1), (3, 50 * MIB)]
    assert replay(sizes(*changes)).reserved == 102 * MIB
    assert replay(sizes(*changes), capacity=60 * MIB) == Reserve(52 * MIB, 52 * MIB, 52 * MIB, 1)
    with pytest.raises(DeviceFullError):
        replay(sizes(*changes, (4, 30 * MIB)), capacity=60 * MIB)


def test_a_segment_in_use_is_never_given_back() -> None:
    """A byte in a 20 MiB segment keeps all of it."""
    changes = [(1, 2 * MIB), (2, 18 * MIB - BLOCK), (2, -1), (3, 50 * MIB)]
    assert replay(sizes(*changes), capacity=70 * MIB).reserved == 70 * MIB
    with pytest.raises(DeviceFullError):
        replay(sizes(*changes), capacity=69 * MIB)


def test_free_pages_move_to_the_end_of_an_expandable_segment() -> None:
    """Two free pages between used ones hold no 60 MiB; given back they come again behind the last block."""
    changes = [(1, 20 * MIB), (2, 40 * MIB), (3, 20 * MIB), (2, -1), (4, 60 * MIB)]
    assert replay(sizes(*changes), expandable=True).reserved == 140 * MIB
    assert replay(sizes(*changes), expandable=True, capacity=100 * MIB) == Reserve(100 * MIB, 100 * MIB, 100 * MIB, 1)
    with pytest.raises(DeviceFullError):
        replay(sizes(*changes), expandable=True, capacity=99 * MIB)


def test_a_hole_in_an_expandable_segment_is_filled_first() -> None:
    """The 40 MiB given back in the middle come again at the same addresses, before the segment grows."""
    allocator = CachingAllocator(expandable=True, capacity=140 * MIB)
    for storage, size in ((1, 20 * MIB), (2, 40 * MIB), (3, 20 * MIB)):
        allocator.allocate(storage, size)
    allocator.free(2)
    allocator.allocate(4, 80 * MIB)
    assert (allocator.reserved, allocator.releases) == (120 * MIB, 1)
    with pytest.raises(DeviceFullError):
        allocator.allocate(5, 41 * MIB)
    allocator.capacity = 160 * MIB
    allocator.allocate(6, 40 * MIB)
    assert (20 * MIB, 20 * MIB, 60 * MIB) in allocator.live_ranges()
    assert allocator.reserved == 160 * MIB


SIZES = st.one_of(st.integers(0, 4096), st.integers(MIB - 600, MIB + 600), st.integers(2 * MIB, 64 * MIB))
# A number below 0 frees the storage that many places before.
SEQUENCES = st.lists(st.one_of(SIZES, st.integers(-12, -1)), max_size=120)


@settings(max_examples=150, deadline=None)
@given(sequence=SEQUENCES, expandable=st.booleans(), capacity=st.one_of(st.none(), st.integers(20, 200)))
def test_laws(sequence: list[int], expandable: bool, capacity: int | None) -> None:
    """Blocks in use never overlap; reserved ≥ allocated ≥ requested; in the end nothing is left."""
    limit = None if capacity is None else capacity * MIB
    allocator = CachingAllocator(expandable, limit)
    live: list[int] = []
    for number, size in enumerate(sequence):
        if size >= 0:
            try:
                allocator.allocate(number, size)
                live.append(number)
            except DeviceFullError:
                assert limit is not None
        elif len(live) >= -size:
            allocator.free(live.pop(size))
        ranges = sorted(allocator.live_ranges())
        assert all(first[2] <= second[1] for first, second in itertools.pairwise(ranges) if first[0] == second[0])
        assert allocator.reserved >= allocator.allocated >= allocator.requested >= 0
        assert allocator.allocated == sum(end - start for _, start, end in ranges)
        assert limit is None or allocator.reserved <= limit
    for number in live:
        allocator.free(number)
    assert allocator.allocated == allocator.requested == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2 * MIB, 64 * MIB), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_coalescing_leaves_no_crumbs(blocks: list[int], draw: random.Random) -> None:
    """Freed in any order, the blocks of an expandable segment are one block again, as large as all of it."""
    allocator = CachingAllocator(expandable=True)
    for number, size in enumerate(blocks):
        allocator.allocate(number, size)
    for number in draw.sample(range(len(blocks)), len(blocks)):
        allocator.free(number)
    reserved = allocator.reserved
    allocator.allocate(len(blocks), reserved)
    assert allocator.allocated == allocator.reserved == reserved
