"""A matrix as the product of two thin ones, and how a budget is shared between many."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this a whole decomposition takes no longer than a randomised one.
SMALL = 256
FIRST_RANK = 32
# Directions beyond the rank, and passes over the matrix, that make the randomised one as good as the whole.
MORE, PASSES = 16, 4


@dataclass(frozen=True)
class Factors:
    """U [m, r], singular values [r] descending and V [n, r] of a matrix [m, n], and the squares' sum of all of it."""

    left: Tensor
    values: Tensor
    right: Tensor
    energy: float

    @property
    def rank(self) -> int:
        """How many directions there are."""
        return len(self.values)

    @property
    def cost(self) -> int:
        """How many numbers a direction takes."""
        return len(self.left) + len(self.right)

    def kept(self, rank: int) -> float:
        """Return the squares' sum of the first `rank` directions."""
        return float(self.values[:rank].double().square().sum())

    def cut(self, rank: int) -> Factors:
        """Return the first `rank` directions."""
        return Factors(
            self.left[:, :rank].clone(), self.values[:rank].clone(), self.right[:, :rank].clone(), self.energy
        )  # fmt: skip

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return (A [r, n], B [m, r]) whose product B A is the matrix, as large as each other."""
        root = self.values.sqrt()
        return (self.right * root).t().contiguous(), (self.left * root).contiguous()


def factorize(matrix: Tensor, rank: int) -> Factors:
    """Return the `rank` largest directions of float32 [m, n], or all there are; the same for the same matrix."""
    energy, limit = float(matrix.double().square().sum()), min(matrix.shape)
    if limit <= SMALL or rank + MORE >= limit // 2:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return Factors(left, values, right.t(), energy).cut(rank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Factors(*torch.svd_lowrank(matrix, rank + MORE, niter=PASSES), energy).cut(rank)


def factorize_to(matrix: Tensor, keep: float) -> Factors:
    """Return the fewest directions that hold the share `keep` of the squares' sum of a matrix, float32 [m, n]."""
    rank = FIRST_RANK
    while True:
        found = factorize(matrix, rank)
        if found.kept(rank) >= keep * found.energy or found.rank >= min(matrix.shape):
            sums = found.values.double().square().cumsum(0)
            return found.cut(int((sums < keep * found.energy).sum()) + 1)
        rank *= 2


def share_out(found: Mapping[str, Factors], numbers: int) -> dict[str, int]:
    """Return the ranks whose directions hold most of all matrices' squares in this many numbers.

    A direction is worth its square for each number that it takes; directions are taken by that, the best first, from
    any matrix.
    """
    ranks = dict.fromkeys(found, 0)
    waiting = [(-(float(each.values[0]) ** 2) / each.cost, name) for name, each in found.items()]
    heapq.heapify(waiting)
    while waiting:
        _, name = heapq.heappop(waiting)
        each = found[name]
        if each.cost > numbers:
            continue
        numbers -= each.cost
        ranks[name] += 1
        if ranks[name] < each.rank:
            heapq.heappush(waiting, (-(float(each.values[ranks[name]]) ** 2) / each.cost, name))
    return ranks
