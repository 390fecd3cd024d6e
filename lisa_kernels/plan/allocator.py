"""What torch's CUDA allocator would reserve for a trace: a model of its blocks, segments and caches.

After c10/cuda/CUDACachingAllocator.cpp of torch 2.13 with one stream and its default settings, and with
`expandable_segments:True`. Not modelled: several streams, graph pools, `max_split_size_mb`, rounding to powers of two.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from enum import Enum, auto
from operator import attrgetter

from lisa_kernels.plan.trace import Trace

MIB = 2**20
BLOCK = 512  # every size is rounded up to a multiple of this
SMALL_LIMIT = MIB  # blocks up to here live in small segments
SMALL_SEGMENT = 2 * MIB  # also the page by which an expandable segment of small blocks grows
LARGE_SEGMENT = 20 * MIB  # also the page of an expandable segment of large blocks
OWN_SEGMENT_FROM = 10 * MIB  # larger blocks get a segment of their own, rounded up to OWN_SEGMENT_STEP
OWN_SEGMENT_STEP = 2 * MIB
ADDRESS_SPACE = 2**50  # of one expandable segment: more than any device has


class DeviceFullError(MemoryError):
    """A replayed allocation for which the device has no room, its caches given back."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Peaks of one replay, in bytes.

    requested: as torch asks for it. allocated: rounded to blocks, torch's `max_memory_allocated`. reserved: the
    segments that the device gives away, torch's `max_memory_reserved`. releases: how often caches were given back.
    """

    requested: int
    allocated: int
    reserved: int
    releases: int


class _State(Enum):
    USED = auto()
    FREE = auto()
    HOLE = auto()  # addresses of an expandable segment without memory behind them


class _Block:
    """A range of addresses; `before` and `after` are its neighbours in the segment."""

    __slots__ = ("address", "after", "before", "pool", "size", "state")

    def __init__(self, pool: _Pool, address: int, size: int, state: _State) -> None:
        self.pool, self.address, self.size, self.state = pool, address, size, state
        self.before: _Block | None = None
        self.after: _Block | None = None

    def cut(self, size: int, state: _State) -> _Block:
        """Shorten the block to `size` and return the rest, its new neighbour, in `state`."""
        rest = _Block(self.pool, self.address + size, self.size - size, state)
        rest.before, rest.after = self, self.after
        if self.after is not None:
            self.after.before = rest
        self.after, self.size = rest, size
        return rest

    def absorb(self, right: _Block) -> _Block:
        """Take in the neighbour after this block; returns this block."""
        self.size += right.size
        self.after = right.after
        if right.after is not None:
            right.after.before = self
        return self

    def room(self) -> int:
        """The bytes up to the next block in use or free: those of a hole that follows count."""
        hole = self.after
        return self.size + (hole.size if hole is not None and hole.state is _State.HOLE else 0)


class _Pool:
    """Blocks of like size: the free ones by (size, address), the holes of an expandable segment by address."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.blocks: dict[int, _Block] = {}
        self.free: list[tuple[int, int]] = []
        self.holes: list[_Block] = []

    def put(self, block: _Block) -> _Block:
        """Join a free block or hole with neighbours in its state, list it, and return it as it is then."""
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.state is block.state:
                self.take(neighbour)
                block = block.absorb(neighbour) if neighbour is block.after else neighbour.absorb(block)
        if block.state is _State.HOLE:
            insort(self.holes, block, key=attrgetter("address"))
        else:
            insort(self.free, (block.size, block.address))
            self.blocks[block.address] = block
        return block

    def take(self, block: _Block) -> None:
        """Take a free block or hole off its list."""
        if block.state is _State.HOLE:
            self.holes.remove(block)
        else:
            del self.free[bisect_left(self.free, (block.size, block.address))]
            del self.blocks[block.address]

    def best(self, size: int) -> _Block | None:
        """Return the smallest free block that holds `size`; one that a hole follows counts with the hole."""
        index = bisect_left(self.free, (size, 0))
        if index == len(self.free):
            return None
        block = self.blocks[self.free[index][1]]
        while block.room() > block.size and index + 1 < len(self.free):
            index += 1
            following = self.blocks[self.free[index][1]]
            if following.room() >= block.room():
                break
            block = following
        return block

    def lowest_run(self, size: int) -> _Block:
        """Return where the first run of free blocks and holes begins that spans `size` and has a hole to fill."""
        for hole in self.holes:
            start = hole.before if hole.before is not None and hole.before.state is _State.FREE else hole
            span, block = 0, start
            while span < size and block.state is not _State.USED:
                span += block.size
                if block.after is None:
                    break
                block = block.after
            if span >= size:
                return start
        first = _Block(self, 0, ADDRESS_SPACE, _State.HOLE)
        return self.put(first)


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


class CachingAllocator:
    """Hands out blocks as torch's CUDA allocator does.

    expandable: one growing segment for each of the two pools, in place of many fixed ones. capacity: the bytes that the
    device has for segments; None for any number.
    """

    def __init__(self, expandable: bool = False, capacity: int | None = None) -> None:
        self.expandable, self.capacity = expandable, capacity
        self.requested = self.allocated = self.reserved = self.releases = 0
        self._peaks = [0, 0, 0]
        self._small, self._large = _Pool(SMALL_SEGMENT), _Pool(LARGE_SEGMENT)
        self._live: dict[int, tuple[_Block, int]] = {}
        self._next_address = 0

    def allocate(self, storage: int, size: int) -> None:
        """Find a block for `size` bytes; raises DeviceFullError where there is no room."""
        if not size:
            return
        rounded = _round_up(size, BLOCK)
        pool = self._small if rounded <= SMALL_LIMIT else self._large
        block = pool.best(rounded) or self._grow(pool, rounded)
        pool.take(block)
        block.state = _State.USED
        spare = block.size - rounded
        if spare >= BLOCK if pool is self._small or self.expandable else spare > SMALL_LIMIT:
            pool.put(block.cut(rounded, _State.FREE))
        self._live[storage] = block, size
        self._count(size, block.size)

    def free(self, storage: int) -> None:
        """Put a storage's block back into its pool; one of no bytes has none."""
        if storage not in self._live:
            return
        block, size = self._live.pop(storage)
        self._count(-size, -block.size)
        block.state = _State.FREE
        block.pool.put(block)

    def live_ranges(self) -> list[tuple[int, int, int]]:
        """Return (pool's page, first address, address after the last) of each block in use."""
        return [(block.pool.page, block.address, block.address + block.size) for block, _ in self._live.values()]

    @property
    def peaks(self) -> Reserve:
        """The peaks so far."""
        requested, allocated, reserved = self._peaks
        return Reserve(requested, allocated, reserved, self.releases)

    def _count(self, requested: int, allocated: int) -> None:
        self.requested += requested
        self.allocated += allocated
        if requested > 0:
            now = (self.requested, self.allocated, self.reserved)
            self._peaks = [max(pair) for pair in zip(self._peaks, now)]

    def _grow(self, pool: _Pool, size: int) -> _Block:
        """Return a new free block of at least `size`; caches are given back where there is no room for one."""
        grow = self._extend if self.expandable else self._add_segment
        block = grow(pool, size)
        if block is None:
            self.releases += 1
            for either in (self._small, self._large):
                self._release(either)
            block = grow(pool, size)
        if block is None:
            raise DeviceFullError(f"no room for {size} bytes beside {self.reserved} reserved of {self.capacity}.")
        return block

    def _reserve(self, size: int) -> bool:
        if self.capacity is not None and self.reserved + size > self.capacity:
            return False
        self.reserved += size
        return True

    def _add_segment(self, pool: _Pool, size: int) -> _Block | None:
        segment = pool.page if size < OWN_SEGMENT_FROM else _round_up(size, OWN_SEGMENT_STEP)
        if not self._reserve(segment):
            return None
        block = _Block(pool, self._next_address, segment, _State.FREE)
        self._next_address += segment
        return pool.put(block)

    def _extend(self, pool: _Pool, size: int) -> _Block | None:
        """Put memory behind the lowest holes that make a free block of `size`."""
        block = pool.lowest_run(size)
        while block.state is _State.HOLE or block.size < size:
            hole = block if block.state is _State.HOLE else block.after
            wanted = size if block is hole else size - block.size
            assert hole is not None
            mapped = min(hole.size, _round_up(wanted, pool.page))
            if not self._reserve(mapped):
                return None
            pool.take(hole)
            hole.state = _State.FREE
            if mapped < hole.size:
                pool.put(hole.cut(mapped, _State.HOLE))
            block = pool.put(hole)
        return block

    def _release(self, pool: _Pool) -> None:
        """Give back the memory of whole free segments, or of whole free pages of an expandable one."""
        for block in list(pool.blocks.values()):
            if self.expandable:
                first, last = _round_up(block.address, pool.page), (block.address + block.size) // pool.page * pool.page
            elif block.before is None and block.after is None:
                first, last = block.address, block.address + block.size
            else:
                continue
            if first < last:
                pool.take(block)
                self._drop(pool, block, first, last)

    def _drop(self, pool: _Pool, block: _Block, first: int, last: int) -> None:
        """Make a hole of the addresses from `first` to `last` of a free block that is on no list."""
        self.reserved -= last - first
        if not self.expandable:
            return
        end, hole = block.address + block.size, block
        if first > block.address:
            hole = block.cut(first - block.address, _State.HOLE)
            pool.put(block)
        hole.state = _State.HOLE
        if end > last:
            pool.put(hole.cut(last - first, _State.FREE))
        pool.put(hole)


def replay(trace: Trace, expandable: bool = False, capacity: int | None = None) -> Reserve:
    """Return what the allocator reserves for the storages of `trace`; raises DeviceFullError above `capacity`."""
    allocator = CachingAllocator(expandable, capacity)
    for event in trace.events:
        if event.bytes > 0:
            allocator.allocate(event.storage, event.bytes)
        else:
            allocator.free(event.storage)
    return allocator.peaks
