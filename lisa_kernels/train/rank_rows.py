"""Which rows each of several ranks trains on, so that all of them together take those of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lisa_kernels.errors import InputError
from lisa_kernels.train.chat import IGNORED
from lisa_kernels.train.packing import Row

# In the place of a row, where a rank has none left of the last rows of a pass.
BLANK = -1


def share_of_rank(batch_size: int, accumulate: int, ranks: int) -> tuple[int, int]:
    """Return one rank's (rows of a micro-batch, micro-batches of a step), for steps of as many rows as one process has.

    Smaller micro-batches where they divide: all ranks' together are then those of one process, and so are the bases
    that are found from the first of a step. Else fewer ones. Raises InputError where neither divides.
    """
    if batch_size % ranks == 0:
        return batch_size // ranks, accumulate
    if accumulate % ranks == 0:
        return batch_size, accumulate // ranks
    raise InputError(
        f"a step has {accumulate} micro-batches of {batch_size} rows, which {ranks} processes cannot share evenly; "
        f"give --batch-size or --accumulate a multiple of {ranks}."
    )


class RankBatches(Sampler[list[int]]):
    """The micro-batches of one rank in a pass over the rows, as lists of row numbers.

    The order of a pass follows from seed and pass alone, as that of one process does (accelerate's
    `SeedableRandomSampler`), and so do the rows of each step, whatever the number of ranks. batch_size: of one rank.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, rank: int, ranks: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.ranks = rank, ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the pass that comes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // (self.batch_size * self.ranks))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(self.rows, generator=generator).tolist()
        for start in range(0, self.rows, self.batch_size * self.ranks):
            first = start + self.rank * self.batch_size
            yield order[first : first + self.batch_size] or [BLANK]
        self.epoch += 1


class RowsOrBlank(Dataset[Row]):
    """The rows, and for the number `BLANK` one without labels, with which a rank goes along and adds nothing."""

    def __init__(self, rows: Sequence[Row] | Dataset[Row]) -> None:
        self._rows = rows

    def __getitem__(self, index: int) -> Row:
        if index != BLANK:
            return self._rows[index]
        row = self._rows[0]
        return {**row, "labels": torch.full_like(row["labels"], IGNORED)}


class RankLoader(DataLoader[Any]):
    """A loader of one rank's micro-batches, told by the Trainer which pass begins."""

    def __init__(self, rows: Dataset[Row], batches: RankBatches, collate: Callable[[Any], Any], pin: bool) -> None:
        super().__init__(RowsOrBlank(rows), batch_sampler=batches, collate_fn=collate, pin_memory=pin)
        self._batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the pass that comes."""
        self._batches.set_epoch(epoch)
