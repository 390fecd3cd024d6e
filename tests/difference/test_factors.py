"""Thin products of a matrix: the best there are of their rank, and ranks that follow a budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lisa_kernels.difference import factors
from lisa_kernels.difference.factors import Factors, factorize, factorize_to, share_out


def decaying(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Return a matrix whose singular values fall by a tenth each."""
    generator = torch.Generator().manual_seed(seed)
    count = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, count, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, count, generator=generator))
    return (left * 0.9 ** torch.arange(count)) @ right.t()


@pytest.mark.parametrize("small", [0, 4096])
@pytest.mark.parametrize("shape", [(200, 120), (90, 300)])
def test_the_product_is_the_best_of_its_rank(
    shape: tuple[int, int], small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the whole decomposition and by the randomised one: what is left is the smaller singular values."""
    monkeypatch.setattr(factors, "SMALL", small)
    matrix = decaying(*shape)
    found = factorize(matrix, 12)
    down, up = found.pair()
    assert (down.shape, up.shape) == ((12, shape[1]), (shape[0], 12))
    left = float((matrix - up @ down).square().sum())
    best = sum(0.81**n for n in range(12, min(shape)))
    assert left == pytest.approx(best, rel=1e-3)
    assert found.energy - found.kept(12) == pytest.approx(best, rel=1e-3)
    assert torch.equal(factorize(matrix, 12).left, found.left)


def test_the_rank_is_the_least_that_keeps_the_share() -> None:
    """Of squares that fall by 0.81 each, 1 − 0.81ʳ are in the first r."""
    for keep, rank in ((0.5, 4), (0.9, 11), (0.99999, 55)):
        assert factorize_to(decaying(150, 130), keep).rank == rank


def test_a_budget_goes_to_the_largest_squares_for_their_numbers() -> None:
    """A direction of a matrix half as large in sum of sides is worth as much at half the square."""

    def made(values: list[float], sides: tuple[int, int]) -> Factors:
        count = len(values)
        return Factors(torch.zeros(sides[0], count), torch.tensor(values), torch.zeros(sides[1], count), 1.0)

    found = {"large": made([4.0, 3.0, 0.1], (8, 12)), "small": made([2.5, 2.0], (4, 6)), "none": made([0.01], (2, 3))}
    assert share_out(found, 20) == {"large": 1, "small": 0, "none": 0}
    assert share_out(found, 30) == {"large": 1, "small": 1, "none": 0}
    assert share_out(found, 65) == {"large": 2, "small": 2, "none": 1}
