"""Tensors that are parts of larger ones: tiles lie where those of the whole would, so that random numbers are its own.

A program knows the place of its tile in the tensor, and hashes that. So the rows of a part say where element 0 of the
whole would be, and its first tile is not number 0. A part that begins within a tile has its begin worked on in copies,
behind zeros for what is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lisa_kernels.ops.tiles import COUNT_COLUMN


def displace(
    table: Tensor, lists: Sequence[Sequence[Tensor]], starts: Tensor, elements: Sequence[int]
) -> Tensor:  # fmt: skip
    """Have the rows of a table begin where element 0 of the whole would be, in place, and return `starts`.

    Counts grow by as much. starts: int64 [k], the places of the first elements in the whole; elements: how many there
    are to an item of each list's tensors.
    """
    for column, (tensors, each) in enumerate(zip(lists, elements)):
        sizes = torch.tensor([tensor.element_size() for tensor in tensors], dtype=torch.int64)
        table[:, column] -= starts // each * sizes
    table[:, COUNT_COLUMN] += starts
    return starts


class Parts(NamedTuple):
    """Lists of tensors that begin where tiles do, the places of their first elements, and the row each one came from.

    begins: copies of begins of tensors, and what of which tensor is in each.
    """

    lists: list[list[Tensor]]
    starts: list[int]
    rows: list[int]
    begins: list[tuple[Tensor, Tensor]]

    def write_back(self) -> None:
        """Put what was done to the copies where it belongs."""
        for target, copy in self.begins:
            target.copy_(copy)


def cut_at_tiles(
    lists: Sequence[Sequence[Tensor]], starts: Sequence[int], tile: int, elements: Sequence[int]
) -> Parts:  # fmt: skip
    """Return the tensors cut in two where they begin within a tile of so many elements; elements: as for `displace`."""
    parts = Parts([[] for _ in lists], [], [], [])
    for row, start in enumerate(starts):
        before, count = start % tile, lists[0][row].numel()
        begin = min(tile - before, count) if before else 0
        if begin:
            for own, tensors, each in zip(parts.lists, lists, elements):
                target = tensors[row].view(-1)[: -(-begin // each)]
                copy = torch.cat([target.new_zeros(before // each), target])
                own.append(copy)
                parts.begins.append((target, copy[before // each :]))
            parts.starts.append(start - before)
            parts.rows.append(row)
        if begin < count:
            for own, tensors, each in zip(parts.lists, lists, elements):
                own.append(tensors[row].view(-1)[begin // each :])
            parts.starts.append(start + begin)
            parts.rows.append(row)
    return parts
