"""Moments carried into a new basis are what Adam would have held there."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import TRANSPORT
from torch import Tensor

from lisa_kernels.basis import transport_moments
from lisa_kernels.basis.transport import largest_update_squared

RANK, COLUMNS = 12, 300
BETAS = (0.9, 0.999)


def rotation(seed: int, angle: float | None = None) -> Tensor:
    """Return float32 [RANK, RANK], orthogonal; a small `angle` stays near the identity."""
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(RANK, RANK, generator=g, dtype=torch.float64)
    if angle is None:
        return torch.linalg.qr(matrix)[0].float()
    return torch.matrix_exp(angle * (matrix - matrix.t()) / RANK**0.5).float()


def moments_of(gradients: Tensor, betas: tuple[float, float] = BETAS) -> tuple[Tensor, Tensor]:
    """Return Adam's float32 (m, v) after gradients [steps, RANK, COLUMNS]."""
    m, v = torch.zeros(gradients.shape[1:]).double(), torch.zeros(gradients.shape[1:]).double()
    for gradient in gradients.double():
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient * gradient
    return m.float(), v.float()


def stationary_gradients(steps: int, seed: int = 0) -> Tensor:
    """Return gradients [steps, RANK, COLUMNS] with a mean and noise of other sizes in every row, uncorrelated."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1.5, 0, RANK)[:, None]
    mean = torch.randn(RANK, COLUMNS, generator=g)
    return scale * (mean + torch.randn(steps, RANK, COLUMNS, generator=g))


def step_of(count: int) -> Tensor:
    return torch.tensor(count, dtype=torch.int64)


def relative(given: Tensor, wanted: Tensor) -> float:
    return float((given.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("steps", [1, 2, 100], ids=str)
def test_the_identity_changes_nothing_but_the_last_places(steps: int) -> None:
    m, v = moments_of(stationary_gradients(steps))
    new_m, new_v = transport_moments(m, v, torch.eye(RANK), step_of(steps), BETAS)
    assert bool(((new_m - m).abs() <= TRANSPORT * m.abs()).all())
    # v is a difference and a sum of v̂ and m̂² again: the error is relative to the larger of them.
    m_hat_squared = (m / (1 - BETAS[0] ** steps)) ** 2 * (1 - BETAS[1] ** steps)
    assert bool(((new_v - v).abs() <= TRANSPORT * (v + m_hat_squared)).all())


@pytest.mark.parametrize("steps", [1, 100], ids=str)
def test_a_permutation_with_signs_permutes_the_moments(steps: int) -> None:
    m, v = moments_of(stationary_gradients(steps))
    order = torch.randperm(RANK, generator=torch.Generator().manual_seed(1))
    sign = torch.where(torch.arange(RANK) % 2 == 0, 1.0, -1.0)[:, None]
    new_m, new_v = transport_moments(m, v, torch.eye(RANK)[order] * sign, step_of(steps), BETAS)
    assert torch.allclose(new_m, m[order] * sign, rtol=TRANSPORT, atol=0)
    assert torch.allclose(new_v, v[order], rtol=TRANSPORT * 4, atol=0)


def test_the_first_moment_is_carried_exactly_by_every_rotation() -> None:
    gradients, q = stationary_gradients(50), rotation(2)
    wanted, _ = moments_of(q @ gradients)
    given, _ = transport_moments(*moments_of(gradients), q, step_of(50), BETAS)
    assert relative(given, wanted) <= TRANSPORT


@pytest.mark.parametrize("angle", [None, 0.3], ids=["any-rotation", "small-rotation"])
def test_transported_moments_are_nearer_the_true_ones_than_those_left_behind(angle: float | None) -> None:
    gradients, q = stationary_gradients(400), rotation(3, angle)
    m, v = moments_of(gradients)
    true_m, true_v = moments_of(q @ gradients)
    new_m, new_v = transport_moments(m, v, q, step_of(400), BETAS)
    assert relative(new_m, true_m) < 0.01 * relative(m, true_m)
    assert relative(new_v, true_v) < 0.5 * relative(v, true_v)
    assert relative(new_v, true_v) < 0.15


def test_rotating_v_alone_without_the_squared_mean_is_worse() -> None:
    """Negative control of the formula: (Q∘Q) v treats the mean as noise."""
    gradients, q = stationary_gradients(400), rotation(3)
    m, v = moments_of(gradients)
    _, true_v = moments_of(q @ gradients)
    _, new_v = transport_moments(m, v, q, step_of(400), BETAS)
    assert relative(new_v, true_v) < 0.5 * relative((q * q) @ v, true_v)


@pytest.mark.parametrize("seed", range(4), ids=str)
def test_the_second_moment_stays_non_negative_and_finite_for_any_input(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    m = torch.randn(RANK, COLUMNS, generator=g) * 10.0 ** torch.randint(-12, 3, (RANK, COLUMNS), generator=g)
    v = torch.rand(RANK, COLUMNS, generator=g) * 10.0 ** torch.randint(-24, 3, (RANK, COLUMNS), generator=g)
    new_m, new_v = transport_moments(m, v, rotation(seed), step_of(seed + 1), BETAS)
    assert bool(torch.isfinite(new_m).all())
    assert bool(torch.isfinite(new_v).all())
    assert bool((new_v >= 0).all())


def test_fresh_moments_stay_zero() -> None:
    zero = torch.zeros(RANK, COLUMNS)
    new_m, new_v = transport_moments(zero, zero, rotation(0), step_of(0), BETAS)
    assert torch.equal(new_m, zero)
    assert torch.equal(new_v, zero)


def largest_update(m: Tensor, v: Tensor, steps: int) -> float:
    corrections = 1 - BETAS[0] ** steps, 1 - BETAS[1] ** steps
    return float(((m / corrections[0]).abs() / ((v / corrections[1]).sqrt() + 1e-30)).max())


def test_no_update_exceeds_adams_own_bound_after_gradients_that_grew() -> None:
    """Where m̂² exceeds v̂ the formula's two terms cancel somewhere: without the bound an update is ten times larger."""
    steps = 100
    growth = 1.05 ** torch.arange(steps)[:, None, None]
    gradients = torch.cat([stationary_gradients(steps, seed) for seed in range(10)], dim=2) * growth
    q = rotation(5)
    m, v = moments_of(gradients)
    bound = math.sqrt(largest_update_squared(BETAS) * (1 - BETAS[1] ** steps)) / (1 - BETAS[0] ** steps)
    assert largest_update(*transport_moments(m, v, q, step_of(steps), BETAS), steps) <= bound * (1 + TRANSPORT)
    corrections = 1 - BETAS[0] ** steps, 1 - BETAS[1] ** steps
    mean, square = m / corrections[0], v / corrections[1]
    plain = ((q * q) @ (square - mean * mean) + (q @ mean) ** 2).abs()
    assert largest_update((q @ mean) * corrections[0], plain * corrections[1], steps) > 10 * bound


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.5, 0.9), (0.0, 0.9)], ids=str)
def test_the_bound_is_reached_by_one_history_and_passed_by_none(betas: tuple[float, float]) -> None:
    bound = largest_update_squared(betas)
    steps = 2000
    # Cauchy-Schwarz is an equality for gradients that grow by β₂/β₁ backwards in time.
    growth = (betas[0] / betas[1]) ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)[:, None, None]
    m, v = moments_of(growth, betas)
    assert float(m**2 / v) == pytest.approx(bound, rel=1e-3)
    noise = torch.randn(200, 1, 500, generator=torch.Generator().manual_seed(0)).exp()
    m, v = moments_of(noise, betas)
    assert float((m**2 / v).max()) <= bound * (1 + TRANSPORT)


@pytest.mark.parametrize("betas", [(0.9, 0.5), (0.9, 0.0)], ids=str)
def test_betas_without_a_bound_hold_nothing_up(betas: tuple[float, float]) -> None:
    assert largest_update_squared(betas) == math.inf


def test_no_first_moment_and_no_memory_bound_the_update_by_one() -> None:
    assert largest_update_squared((0.0, 0.0)) == 1.0


def test_a_direction_of_which_the_old_basis_knew_nothing_begins_as_adam_does() -> None:
    """Half of the new rows lie outside the old span: their v̂ is the gradient's square, and updates begin small."""
    steps = 400
    m, v = moments_of(stationary_gradients(steps))
    q = torch.eye(RANK)
    q[RANK // 2 :] = 0
    gradient = stationary_gradients(1, seed=5)[0]
    new_m, new_v = transport_moments(m, v, q, step_of(steps), BETAS, gradient)
    known, _ = transport_moments(m, v, torch.eye(RANK), step_of(steps), BETAS)
    assert torch.equal(new_m[: RANK // 2], known[: RANK // 2])
    assert torch.allclose(new_v[: RANK // 2], v[: RANK // 2], rtol=1e-3)
    correction = 1 - BETAS[1] ** steps
    assert torch.allclose(new_v[RANK // 2 :], gradient[RANK // 2 :] ** 2 * correction, rtol=TRANSPORT)

    def first_update(square: Tensor) -> float:
        """Return the largest update, in units of the rate, that the gradient then makes."""
        mean = 0.9 * new_m + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        return largest_update(mean[RANK // 2 :], square[RANK // 2 :], steps + 1)

    assert first_update(new_v) < 0.2
    without = transport_moments(m, v, q, step_of(steps), BETAS)[1]
    assert first_update(without) > 1.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_never_reaches_the_moments(bad: float) -> None:
    m, v = moments_of(stationary_gradients(20))
    gradient = torch.full_like(m, bad)
    for q in (torch.eye(RANK), 0.5 * torch.eye(RANK)):
        wanted = transport_moments(m, v, q, step_of(20), BETAS)
        given = transport_moments(m, v, q, step_of(20), BETAS, gradient)
        assert all(torch.equal(one, other) for one, other in zip(given, wanted))
