"""Products with a gradient, whether it is formed, known by factors or rows, or spread over ranks, are those of G."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lisa_kernels.basis import FactoredGradient, RandomRows, ScatteredGradient, SharedGradient
from lisa_kernels.basis.gradients import Gradient, lift, project
from lisa_kernels.basis.range_finder import find_first, find_refreshed

TOKENS, M, N, ROWS = 40, 30, 20, 6


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factored(seed: int) -> tuple[Gradient, Tensor]:
    dy, x = values(TOKENS, M, seed=seed), values(TOKENS, N, seed=seed + 10)
    return FactoredGradient(dy, x), dy.t() @ x


def scattered(seed: int) -> tuple[Gradient, Tensor]:
    rows = values(TOKENS, N, seed=seed)
    ids = torch.randint(0, M, (TOKENS,), generator=torch.Generator().manual_seed(seed))
    return ScatteredGradient(rows, ids, M), torch.zeros(M, N).index_add_(0, ids, rows)


def formed(seed: int) -> tuple[Gradient, Tensor]:
    gradient = values(M, N, seed=seed)
    return gradient, gradient


KINDS: dict[str, Callable[[int], tuple[Gradient, Tensor]]] = {
    "formed": formed, "factored": factored, "scattered": scattered
}  # fmt: skip


class Other:
    """What another rank adds: its product with the same rows, given in the order in which they are asked for."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self.rows: Tensor | None = None

    def __call__(self, sketch: Tensor) -> Tensor:
        assert self.rows is not None
        assert sketch.is_contiguous()
        product = self.rows @ (self.whole if len(self.whole) == self.rows.shape[1] else self.whole.t())
        return sketch.add_(product)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_whole(kind: str) -> None:
    gradient, whole = KINDS[kind](0)
    left, rows = values(ROWS, M, seed=5), values(ROWS, N, seed=6)
    assert tuple(gradient.shape) == (M, N)
    torch.testing.assert_close(lift(left, gradient), left @ whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(project(rows, gradient), rows @ whole.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_ranks_add_up(kind: str) -> None:
    """What is summed is the product, contiguous, with the same rows on all ranks."""
    (mine, my_whole), (_, theirs) = KINDS[kind](0), KINDS[kind](1)
    other = Other(theirs)
    shared = SharedGradient(mine, other)
    assert (shared.shape, shared.device) == ((M, N), torch.device("cpu"))
    other.rows = values(ROWS, M, seed=5)
    wanted = other.rows @ (my_whole + theirs)
    torch.testing.assert_close(lift(other.rows, shared), wanted, rtol=1e-4, atol=1e-4)
    other.rows = values(ROWS, N, seed=6)
    wanted = other.rows @ (my_whole + theirs).t()
    torch.testing.assert_close(project(other.rows, shared), wanted, rtol=1e-4, atol=1e-4)


def test_bases_of_a_shared_gradient_of_one_are_its_own() -> None:
    """First and refreshed: sharing with nobody changes no bit."""
    gradient, _ = factored(0)
    shared = SharedGradient(gradient, lambda sketch: sketch)
    alone, together = (find_first(each, ROWS, RandomRows(0)).basis for each in (gradient, shared))
    assert torch.equal(alone, together)
    later, _ = factored(3)
    refreshed = [
        find_refreshed(each, alone, RandomRows(1)).basis for each in (later, SharedGradient(later, lambda one: one))
    ]
    assert torch.equal(*refreshed)
