"""Rows made orthonormal by Cholesky factors are as good as Householder's, for every condition."""

from __future__ import annotations

import pytest
import torch
from tolerances import ORTHONORMAL
from torch import Tensor

from lisa_kernels.basis import orthonormal_rows
from lisa_kernels.basis.orthonormal import deviation, leading_rows, nearest_turn, whitened_rows

RANK, N = 24, 200


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(rows: int = RANK, columns: int = N, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed))


def conditioned(condition: float) -> Tensor:
    """Return float32 [RANK, N] whose singular values fall evenly, on a logarithmic scale, from 1 to 1 / condition."""
    left = torch.linalg.qr(normal(columns=RANK).double())[0]
    right = torch.linalg.qr(normal(seed=1).double().t())[0]
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), RANK, dtype=torch.float64)
    return ((left * values) @ right.t()).float()


def error(rows: Tensor) -> float:
    """Return the largest entry of |Q Qᵀ − 1|, in float64."""
    wide = rows.double()
    return float((wide @ wide.t() - torch.eye(len(rows), dtype=torch.float64)).abs().max())


def inside(rows: Tensor, space: Tensor) -> float:
    """Return the largest part of a row, relative to it, that lies outside the span of the rows of `space`."""
    q = torch.linalg.qr(space.double().t())[0]
    wide = rows.double()
    return float(((wide - wide @ q @ q.t()).norm(dim=1) / wide.norm(dim=1)).max())


def one_hot() -> Tensor:
    rows = torch.zeros(RANK, N)
    rows[:, 150] = normal(columns=1)[:, 0]
    return rows


DEPENDENT = {
    "zero": torch.zeros(RANK, N),
    "one row": normal(1).expand(RANK, N),
    "half": normal(RANK, RANK // 2) @ normal(RANK // 2, N, seed=1),
    "a zero row": normal() * (torch.arange(RANK) != 5)[:, None],
    "one column": one_hot(),
    "unit vectors": torch.eye(RANK, N).flip(0),
    "minus unit vectors": -torch.eye(RANK, N),
    "twice each": normal(RANK // 2).repeat(2, 1),
    "all ones": torch.ones(RANK, N),
}


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6, 1e10], ids="{:.0e}".format)
@pytest.mark.parametrize("scale", [1e-36, 1.0, 1e35], ids=str)
def test_rows_of_every_condition_and_scale_become_orthonormal(condition: float, scale: float) -> None:
    assert error(orthonormal_rows(conditioned(condition) * scale)) <= ORTHONORMAL


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4], ids="{:.0e}".format)
def test_the_span_is_kept(condition: float) -> None:
    """To rounding times the condition; another span, the negative control, is far."""
    rows = conditioned(condition)
    found = orthonormal_rows(rows)
    assert inside(rows, found) < 1e-5 * condition
    assert inside(normal(seed=5), found) > 0.5


@pytest.mark.parametrize("name", list(DEPENDENT))
@pytest.mark.parametrize("filled", [False, True], ids=["unit vectors", "fill"])
def test_dependent_rows_are_completed(name: str, filled: bool) -> None:
    fill = torch.linalg.qr(normal(seed=7).t())[0].t() if filled else None
    assert error(orthonormal_rows(DEPENDENT[name].clone(), fill)) <= ORTHONORMAL


def test_what_completes_them_is_the_fill() -> None:
    """Half of the directions come from the rows, the other half lie in the span of both."""
    fill = torch.linalg.qr(normal(seed=7).t())[0].t()
    rows = DEPENDENT["half"]
    found = orthonormal_rows(rows, fill)
    assert inside(torch.linalg.svd(rows)[2][: RANK // 2], found) < 1e-4
    assert inside(found, torch.cat([rows, fill])) < 0.1
    assert inside(orthonormal_rows(rows, orthonormal_rows(normal(seed=9))), torch.cat([rows, fill])) > 0.5


def test_no_rows_give_the_fill() -> None:
    fill = torch.linalg.qr(normal(seed=7).t())[0].t()
    torch.testing.assert_close(orthonormal_rows(torch.zeros(RANK, N), fill), fill, rtol=0, atol=1e-5)


def test_one_pass_alone_is_not_enough() -> None:
    """Negative control of the second pass."""
    assert error(whitened_rows(conditioned(1e4))) > ORTHONORMAL


def test_the_inputs_are_left_alone() -> None:
    rows, fill = normal(), normal(seed=1)
    kept = rows.clone(), fill.clone()
    orthonormal_rows(rows)
    orthonormal_rows(rows, fill)
    assert torch.equal(rows, kept[0])
    assert torch.equal(fill, kept[1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (5, 5)], ids=str)
def test_small_and_square(shape: tuple[int, int]) -> None:
    assert error(orthonormal_rows(normal(*shape))) <= ORTHONORMAL


def test_the_nearest_turn_is_the_polar_factor() -> None:
    """As the SVD gives it, for two bases of nearby spaces."""
    old = orthonormal_rows(normal())
    new = orthonormal_rows(normal(RANK, RANK, seed=2) @ (old + 0.05 * normal(seed=1)))
    u, _, vh = torch.linalg.svd(old.double() @ new.double().t())
    turn = nearest_turn(old, new)
    assert error(turn) <= ORTHONORMAL
    torch.testing.assert_close(turn.double(), u @ vh, rtol=0, atol=1e-5)


def test_the_nearest_turn_of_spaces_at_right_angles_is_still_a_turn() -> None:
    both = torch.linalg.qr(normal(2 * RANK).t())[0].t()
    assert error(nearest_turn(both[:RANK], both[RANK:])) <= ORTHONORMAL


def test_leading_rows_are_the_leading_singular_vectors_times_their_values() -> None:
    """Where singular values fall by a third from one to the next."""
    left, right = torch.linalg.qr(normal(columns=RANK).double())[0], torch.linalg.qr(normal(seed=1).double().t())[0]
    values = 0.67 ** torch.arange(RANK, dtype=torch.float64)
    found = leading_rows(((left * values) @ right.t()).float(), 6)
    assert found.shape == (6, N)
    torch.testing.assert_close(found.norm(dim=1).double(), values[:6], rtol=1e-3, atol=0)
    cosines = (torch.nn.functional.normalize(found.double()) @ right[:, :6]).abs()
    torch.testing.assert_close(cosines, torch.eye(6, dtype=torch.float64), rtol=0, atol=0.02)


def test_deviation_is_the_largest_entry_off_the_identity() -> None:
    basis = orthonormal_rows(normal())
    assert float(deviation(basis)) <= ORTHONORMAL
    basis[3] *= 1.5
    assert float(deviation(basis)) == pytest.approx(1.25, rel=1e-4)
