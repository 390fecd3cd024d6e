"""The rows of a run's data by their examples' lengths: the micro-batches that they make, without a token of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lisa_kernels.layers import borders_mask

if TYPE_CHECKING:
    from lisa_kernels.train.prepare import RunData

# The tokens of each example of each row.
Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class DataRows:
    """All rows of a run, the fullest first; longest: the tokens of the longest example, a held-out one perhaps."""

    rows: Rows
    longest: int = 0

    def __post_init__(self) -> None:
        """Have the longest be no shorter than those in the rows."""
        object.__setattr__(self, "longest", max(chain([self.longest], *self.rows)))

    @classmethod
    def of(cls, rows: Sequence[dict[str, Tensor]], longest: int = 0) -> DataRows:
        """Return the lengths of rows of tokens, see `row_of`."""
        found = []
        for row in rows:
            begins = torch.zeros(1) if "position_ids" not in row else (row["position_ids"] == 0).nonzero().flatten()
            ends = [*begins.tolist()[1:], len(row["input_ids"])]
            found.append(tuple(int(end - start) for start, end in zip([0, *ends], ends)))
        return cls(tuple(sorted(found, key=sum, reverse=True)), longest)

    def fullest(self, count: int) -> Rows:
        """Return the rows of the micro-batch of so many that takes most memory."""
        return self.rows[:count]

    def typical(self, count: int) -> Rows:
        """Return rows for a micro-batch of so many that takes a mean time: one from each of as many equal parts."""
        count = min(count, len(self.rows))
        return tuple(self.rows[int((number + 0.5) * len(self.rows) / count)] for number in range(count))

    def as_dict(self, seq_len: int) -> dict[str, Any]:
        """Return what is to be told of them, for JSON."""
        tokens = sum(chain.from_iterable(self.rows))
        return {
            "rows": len(self.rows), "examples": sum(map(len, self.rows)), "tokens": tokens,
            "empty_share": 1 - tokens / (len(self.rows) * seq_len), "longest_row": sum(self.rows[0]),
        }  # fmt: skip


def data_rows(data: RunData, model: Any) -> DataRows:
    """Return the rows that a run makes of its data.

    A model without weights cannot be asked whether it keeps packed examples apart; one whose attention takes their
    borders does, and others that take position_ids are taken to.
    """
    train = data.shared[0] if data.expected_to_share(model) else data.train
    return DataRows.of(train.rows, data.longest)


def packed_batch(rows: Rows, by_segments: bool, device: torch.device) -> dict[str, Tensor]:
    """Return a micro-batch of zeros as `collate_flat` does, or, for attention under a mask, `collate`.

    Borders are on the CPU, whose values decide what attention does; every token is a label, but the first of a segment.
    """
    lengths = list(chain.from_iterable(rows))
    shape = (1, sum(lengths)) if by_segments else (len(rows), max(map(sum, rows)))
    names = ("input_ids", "labels", "position_ids")
    batch = {name: torch.zeros(shape, dtype=torch.int64, device=device) for name in names}
    if by_segments:
        batch["attention_mask"] = borders_mask(torch.tensor([0, *lengths]).cumsum(0))
    return batch
