"""Confidence intervals by the bootstrap: the rows drawn again and again, with replacement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 10_000
LEVEL = 0.95
_DRAWN_AT_A_TIME = 1 << 21

Interval = tuple[float, float]


@dataclass(frozen=True)
class Ratio:
    """A quantity Σ above / Σ below over rows, of each of which there is one value of both."""

    above: list[float]
    below: list[float]

    @property
    def value(self) -> float:
        """The quantity over all rows."""
        return sum(self.above) / sum(self.below)

    def over(self, rows: Tensor) -> Tensor:
        """Return the quantity over each of several draws of rows, int64 [draws, rows]."""
        above, below = (torch.tensor(values, dtype=torch.float64) for values in (self.above, self.below))
        return above[rows].sum(1) / below[rows].sum(1)


def interval(ratio: Ratio) -> Interval:
    """Return the 95 % percentile interval of a quantity."""
    return _ends(torch.cat([ratio.over(rows) for rows in _draws(len(ratio.above))]))


def difference_interval(first: Ratio, second: Ratio) -> Interval:
    """Return the 95 % interval of second − first, both over the same rows, drawn in pairs.

    Much narrower than the two intervals apart would say, for what makes a row hard is hard for both.
    """
    return _ends(torch.cat([second.over(rows) - first.over(rows) for rows in _draws(len(first.above))]))


def _draws(rows: int) -> Iterator[Tensor]:
    """Yield row indices, int64 [draws, rows]: the same ones whenever there are so many rows."""
    generator, left = torch.Generator().manual_seed(0), RESAMPLES
    while left:
        count = min(left, max(1, _DRAWN_AT_A_TIME // rows))
        yield torch.randint(rows, (count, rows), generator=generator)
        left -= count


def _ends(values: Tensor) -> Interval:
    ends = torch.quantile(values, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
    return float(ends[0]), float(ends[1])
