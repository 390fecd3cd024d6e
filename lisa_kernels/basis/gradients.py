"""What a range finder asks of a gradient: its products with a few rows, whether it was formed or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lisa_kernels.ops.lowrank_embedding.reference import add_rows_

# 16-bit factors are widened to float32 this many tokens at a time.
BAND_TOKENS = 1024


@dataclass(frozen=True)
class FactoredGradient:
    """G = dYᵀ x float32 [m, n], known by its factors dy [tokens, m] and x [tokens, n] and never formed.

    A product with k rows costs 2·k·tokens·(m + n) operations in place of 2·k·m·n, and no gradient before it.
    """

    dy: Tensor
    x: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.dy.shape[1], self.x.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the factors live."""
        return self.x.device

    def bands(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (dy, x) as float32, in bands of tokens where they are not float32 already."""
        if self.dy.dtype == self.x.dtype == torch.float32:
            yield self.dy, self.x
            return
        for dy, x in zip(self.dy.split(BAND_TOKENS), self.x.split(BAND_TOKENS)):
            yield dy.to(torch.float32), x.to(torch.float32)

    def formed(self) -> Tensor:
        """Return G."""
        return _sum(dy.t() @ x for dy, x in self.bands())


@dataclass(frozen=True)
class ScatteredGradient:
    """G [V, n] of a table, known by float32 rows [tokens, n] and the row of G that each is added to, ids [tokens]."""

    rows: Tensor
    ids: Tensor
    vocabulary: int

    @property
    def shape(self) -> tuple[int, int]:
        """(V, n)."""
        return self.vocabulary, self.rows.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the rows live."""
        return self.rows.device

    def lift(self, left: Tensor) -> Tensor:
        """Return left · G float32 [k, n] for `left` float32 [k, V]."""
        return left.index_select(1, self.ids) @ self.rows

    def project(self, rows: Tensor) -> Tensor:
        """Return rows · Gᵀ float32 [k, V] for `rows` float32 [k, n]."""
        summed = torch.zeros(self.vocabulary, len(rows), dtype=torch.float32, device=rows.device)
        return add_rows_(summed, self.ids, self.rows @ rows.t()).t()


@dataclass(frozen=True)
class SharedGradient:
    """The sum over ranks of gradients of which each rank knows its own, `part`.

    A product with it is the sum of the parts' products, for these are linear in G; what is made of such a sum is then
    the same on all ranks. Nothing as large as G travels. summed: adds up a tensor over the ranks, in place.
    """

    part: Part
    summed: Callable[[Tensor], Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        m, n = self.part.shape
        return m, n

    @property
    def device(self) -> torch.device:
        """Where the part lives."""
        return self.part.device


class Banded(Protocol):
    """G = dYᵀ x whose factors are known a band of tokens at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    def device(self) -> torch.device:
        """Where the factors live."""

    def bands(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (dy [c, m], x [c, n]) as float32."""


Part = Tensor | Banded | ScatteredGradient
Gradient = Part | SharedGradient


def _sum(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total += part
    return total


def lift(left: Tensor, gradient: Gradient) -> Tensor:
    """Return left · G float32 [k, n] for `left` float32 [k, m]."""
    if isinstance(gradient, SharedGradient):
        return gradient.summed(lift(left, gradient.part).contiguous())
    if isinstance(gradient, Tensor):
        return left @ gradient
    if isinstance(gradient, ScatteredGradient):
        return gradient.lift(left)
    return _sum((left @ dy.t()) @ x for dy, x in gradient.bands())


def project(rows: Tensor, gradient: Gradient) -> Tensor:
    """Return rows · Gᵀ float32 [k, m] for `rows` float32 [k, n]."""
    if isinstance(gradient, SharedGradient):
        return gradient.summed(project(rows, gradient.part).contiguous())
    if isinstance(gradient, Tensor):
        return rows @ gradient.t()
    if isinstance(gradient, ScatteredGradient):
        return gradient.project(rows)
    return _sum((rows @ x.t()) @ dy for dy, x in gradient.bands())


def cheaper(gradient: FactoredGradient, rows: int) -> Part:
    """Return the gradient as it is, or formed where its products with `rows` rows in all take fewer operations so."""
    m, n = gradient.shape
    tokens = gradient.x.shape[0]
    factored = rows * tokens * (m + n)
    return gradient if factored <= tokens * m * n + rows * m * n else gradient.formed()
