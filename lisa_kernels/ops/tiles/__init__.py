"""Tiles of elements: how GPU programs divide tensors among themselves, and what a kernel is started with; plain data.

A program works on a tile of consecutive elements, seen as [rows, lanes, vector] for each of a few steps: a row is a
quantisation block (or the whole tile), and step s holds the elements row · BLOCK + s · LANES · VECTOR + lane · VECTOR +
0 … VECTOR − 1, so that a thread reads and writes 16 bytes of the widest tensor at once, neighbours in a warp touch
neighbouring bytes, and few lanes share a block. All tensors of a kernel use this one layout: nothing passes through
shared memory but the absmax of blocks that several warps share.

A launch over a list of tensors reads two tables of int64 on the device: `table` [k, 8], a row of addresses and the
element count per tensor, and `work` [programs], an item per program: row · 2³² + tile. Both are made on the host from
addresses and sizes alone, and copied without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lisa_kernels.ops.capability import check_capability

# Columns of `table`: addresses first, in the order of the kernel's tensors, then the element count in the last one.
COLUMNS = 8
COUNT_COLUMN = COLUMNS - 1
# Bytes that the widest access moves, and what an address must be a multiple of for it.
ACCESS_BYTES = 16
# Elements of the narrowest dtype that such an access moves; with counts that are multiples of it none is cut in two.
LONGEST_VECTOR = 8

# How a program reaches its tile: all of it; a part of it, of which each wide access lies inside or outside; or element
# by element, where addresses or counts are not multiples of the above.
WHOLE, VECTOR, ELEMENT = 0, 1, 2

# Elements per thread of a tile, unless its block is larger than all of the threads' shares.
ELEMENTS_PER_THREAD = 16
WARP = 32
MIN_WARPS = 4
# Larger blocks are gone over twice, a tile of this many elements at a time.
LARGEST_TILE = 4096

# Buffers that captured CUDA graphs read at each replay. Nothing tells when a graph is gone, so they stay.
_captured: list[tuple[Tensor, Tensor]] = []


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: run-time arguments and compile-time constants by name, programs, warps per program."""

    kernel: Any
    arguments: dict[str, Tensor | int]
    constants: dict[str, Any]
    programs: int
    num_warps: int

    def options(self) -> dict[str, Any]:
        """Return Triton's compile options; products are never contracted into sums, as the definition says."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}

    def run(self) -> None:
        """Start the kernel on the current stream."""
        device = next(argument.device for argument in self.arguments.values() if isinstance(argument, Tensor))
        with torch.cuda.device(device):
            self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options())


@dataclass(frozen=True)
class Tiles:
    """The tiles of some tensors that one launch covers: int64 [tensors] each, `rows` being places in the lists."""

    access: int
    rows: Tensor
    first: Tensor
    count: Tensor

    @property
    def programs(self) -> int:
        """One per tile."""
        return int(self.count.sum())

    def large(self, programs: int) -> tuple[list[tuple[int, int, int]], Tiles | None]:
        """Return (row, first tile, tiles) of each tensor of that many programs or more, and the tiles of the others."""
        if len(self.rows) == 1:
            programs = 0
        is_large = self.count >= programs
        columns = torch.stack([self.rows, self.first, self.count], dim=1)
        small = None if is_large.all() else Tiles(self.access, *columns[~is_large].unbind(dim=1))
        return [(row, first, count) for row, first, count in columns[is_large].tolist()], small

    def items(self) -> Tensor:
        """Return the work items, int64 [programs]."""
        before = self.count.cumsum(0) - self.count
        return torch.arange(self.programs) + torch.repeat_interleave(
            (self.rows << 32) + self.first - before, self.count
        )


def pointer_table(lists: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the table of tensors, int64 [k, 8]: addresses, zeros, the first list's element counts."""
    k = len(lists[0])
    table = np.zeros((COLUMNS, k), dtype=np.int64)
    for column, tensors in enumerate(lists):
        table[column] = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, k)
    table[COUNT_COLUMN] = np.fromiter(map(Tensor.numel, lists[0]), np.int64, k)
    return torch.from_numpy(table).t().contiguous()


def rows_by_dtypes(lists: Sequence[Sequence[Tensor]]) -> dict[tuple[torch.dtype, ...], Tensor]:
    """Return for each combination of dtypes in the lists the rows that have it, int64 each."""
    combinations = list(zip(*([tensor.dtype for tensor in tensors] for tensors in lists)))
    kinds = list(dict.fromkeys(combinations))
    if len(kinds) == 1:
        return {kinds[0]: torch.arange(len(combinations))}
    return {kind: torch.tensor([row for row, other in enumerate(combinations) if other == kind]) for kind in kinds}


def split(
    table: Tensor, rows: Tensor, tile: int, columns: Sequence[int], starts: Tensor | None = None
) -> list[Tiles]:  # fmt: skip
    """Return the tiles, of so many elements, of these rows of a table, by how they can be reached; each kind once.

    columns: of the tensors that are reached by wide accesses. starts: of displaced rows (`parts.displace`), int64 [k].
    """
    addresses, counts = table[:, columns][rows], table[rows, COUNT_COLUMN]
    begin = torch.zeros_like(counts) if starts is None else starts[rows] // tile
    aligned = (addresses % ACCESS_BYTES == 0).all(dim=1)
    vector = aligned & (counts % LONGEST_VECTOR == 0)
    whole = torch.where(aligned, counts // tile, begin)
    rest = -(-counts // tile) - whole
    part, odd = torch.where(vector, rest, 0), torch.where(vector, 0, rest)
    tiles = []
    for access, first, count in ((WHOLE, begin, whole - begin), (VECTOR, whole, part), (ELEMENT, whole, odd)):
        some = count > 0
        if some.any():
            tiles.append(Tiles(access, rows[some], first[some], count[some]))
    return tiles


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for it; a CUDA graph under capture will copy it at each replay."""
    if device.type != "cuda":
        return host.to(device)
    pinned = host.pin_memory()
    copy = pinned.to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.append((pinned, copy))
    return copy


@dataclass(frozen=True)
class TableGroup:
    """A launch to be, over tiles that share their dtypes and access; `own`: arguments it shares with no other."""

    kernel: Any
    tiles: Tiles
    constants: dict[str, Any]
    num_warps: int
    own: dict[str, Tensor] = field(default_factory=dict)


def table_launches(
    table: Tensor, groups: Sequence[TableGroup], common: dict[str, Tensor], device: torch.device
) -> list[Launch]:
    """Return one launch per group; all their tables go to the device in one copy."""
    if not groups:
        return []
    parts = [table.view(-1), *(group.tiles.items() for group in groups)]
    copies = to_device(torch.cat(parts), device).split([part.numel() for part in parts])
    launches = []
    for group, work in zip(groups, copies[1:]):
        arguments: dict[str, Tensor | int] = {"table": copies[0], "work": work, **common, **group.own}
        programs = group.tiles.programs
        launches.append(Launch(group.kernel, arguments, group.constants, programs, group.num_warps))
    return launches


class Shape(NamedTuple):
    """How a program's elements are laid out; the first six are compile-time constants of the kernels."""

    BLOCK: int
    ROWS: int
    LANES: int
    VECTOR: int
    STEPS: int
    PASSES: int
    num_warps: int

    @property
    def elements(self) -> int:
        """Elements of one program: whole blocks."""
        return self.ROWS * self.LANES * self.VECTOR * self.STEPS * self.PASSES

    def constants(self) -> dict[str, int]:
        """Return the compile-time constants by name."""
        return {name: value for name, value in self._asdict().items() if name.isupper()}


def tile_shape(block_size: int, vector: int, warp: int = WARP) -> Shape:
    """Choose the layout for a block size and a vector of elements, on a device with so many threads in a warp."""
    tile = min(max(block_size, MIN_WARPS * WARP * ELEMENTS_PER_THREAD), LARGEST_TILE)
    inside = min(block_size, tile)
    # 32 neighbouring bytes or more of the widest tensor per row, or sectors would be fetched in halves.
    lanes = min(inside // vector, max(inside // ELEMENTS_PER_THREAD, 2 * ACCESS_BYTES // vector))
    steps = inside // (lanes * vector)
    passes = max(block_size // tile, 1)
    return Shape(block_size, tile // inside, lanes, vector, steps, passes, tile // (ELEMENTS_PER_THREAD * warp))


@cache
def warp_size(device: torch.device) -> int:
    """Return how many threads of a device run in step; raises InputError for a device too old for kernels."""
    check_capability(device)
    return int(torch.cuda.get_device_properties(device).warp_size)


def vector_of(dtype: torch.dtype) -> int:
    """Return how many elements one access of 16 bytes moves."""
    return ACCESS_BYTES // dtype.itemsize
