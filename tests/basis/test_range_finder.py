"""Bases found by sketching and refreshed by a warm pass hold what the exact SVD holds."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import BASIS_ENERGY, FILLED_UP, ORTHONORMAL
from torch import Tensor

from lisa_kernels.basis import (
    FactoredGradient,
    RandomRows,
    first_basis,
    orthonormal_rows,
    random_basis,
    range_finder,
    refresh_basis,
)
from lisa_kernels.basis.gradients import cheaper
from lisa_kernels.basis.orthonormal import deviation
from lisa_kernels.basis.range_finder import find_first, find_refreshed

M, N, RANK = 160, 256, 16
CPU = torch.device("cpu")
# How the singular values fall: index k from 0.
SPECTRA = {
    "geometric": lambda k: 0.9**k,
    "power-law": lambda k: 1 / (k + 1),
    "slow-power-law": lambda k: 1 / (k + 1) ** 0.6,
    "outliers-over-noise": lambda k: torch.where(k < 4, 50.0, 1.0) * 0.98**k,
    "low-rank-plus-noise": lambda k: torch.where(k < RANK, 1.0, 0.05),
}  # fmt: skip
every_spectrum = pytest.mark.parametrize("spectrum", list(SPECTRA))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def source(seed: int = 0) -> RandomRows:
    return RandomRows(seed)


def gradient_of(spectrum: str, seed: int = 0) -> Tensor:
    """Return float32 [M, N] with the named singular values and random directions."""
    g = generator(seed)
    left = torch.linalg.qr(torch.randn(M, M, generator=g, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(N, M, generator=g, dtype=torch.float64))[0]
    values = SPECTRA[spectrum](torch.arange(M, dtype=torch.float64))
    return ((left * values) @ right.t()).float()


def energy(basis: Tensor, gradient: Tensor) -> float:
    """Return the energy that the basis keeps over what the best basis of its rank keeps."""
    kept = (basis.double() @ gradient.double().t()).square().sum()
    best = torch.linalg.svdvals(gradient.double())[: basis.shape[0]].square().sum()
    return float(kept / best)


def assert_orthonormal(basis: Tensor) -> None:
    unit = torch.eye(basis.shape[0], dtype=torch.float64)
    assert float((basis.double() @ basis.double().t() - unit).abs().max()) <= ORTHONORMAL


@every_spectrum
def test_the_first_basis_keeps_what_the_exact_svd_keeps(spectrum: str) -> None:
    gradient = gradient_of(spectrum)
    basis = first_basis(gradient, RANK, source())
    assert basis.dtype == torch.float32
    assert basis.shape == (RANK, N)
    assert_orthonormal(basis)
    assert energy(basis, gradient) >= BASIS_ENERGY


@every_spectrum
def test_the_energy_check_sees_a_random_basis(spectrum: str) -> None:
    assert energy(random_basis(RANK, N, source(), CPU), gradient_of(spectrum)) < 0.5


@every_spectrum
def test_the_first_basis_orders_its_rows_by_energy(spectrum: str) -> None:
    """The first rows hold what a smaller basis would; the last, the negative control, do not."""
    gradient = gradient_of(spectrum)
    basis = first_basis(gradient, RANK, source())
    assert energy(basis[: RANK // 4], gradient) >= 0.95
    assert energy(basis[: RANK // 2], gradient) >= 0.98
    # Of the spectra one is flat there.
    assert energy(basis[-RANK // 4 :], gradient) < (0.5 if spectrum != "low-rank-plus-noise" else 1)


@every_spectrum
def test_one_warm_refresh_mends_a_perturbed_basis(spectrum: str) -> None:
    gradient = gradient_of(spectrum)
    exact = torch.linalg.svd(gradient)[2][:RANK]
    basis = orthonormal_rows(exact + 0.06 * torch.randn(RANK, N, generator=generator(3)))
    assert energy(basis, gradient) < 0.8
    basis = refresh_basis(gradient, basis)
    assert_orthonormal(basis)
    assert energy(basis, gradient) >= BASIS_ENERGY


@every_spectrum
def test_a_warm_refresh_finds_directions_that_the_old_basis_does_not_see(spectrum: str) -> None:
    """The old rows lie in the gradient's weakest directions, so only the random ones that go along can help."""
    gradient = gradient_of(spectrum)
    weakest = torch.linalg.svd(gradient)[2][-RANK:]
    assert energy(weakest, gradient) < 0.2
    once = refresh_basis(gradient, weakest, source(1))
    assert energy(once, gradient) > 0.7
    assert energy(refresh_basis(gradient, once, source(2)), gradient) > 0.97


def test_refreshes_follow_a_gradient_that_turns() -> None:
    """Kept as it was, the negative control, the basis loses the energy."""
    old, turn = gradient_of("power-law"), torch.randn(N, N, generator=generator(4)) / N**0.5
    rotation = torch.matrix_exp(0.1 * (turn - turn.t()))
    kept = basis = first_basis(old, RANK, source())
    for step in range(1, 11):
        gradient = old @ torch.linalg.matrix_power(rotation, step)
        basis = refresh_basis(gradient, basis)
    assert energy(basis, gradient) >= BASIS_ENERGY
    assert energy(kept, gradient) < 0.6


@every_spectrum
def test_refreshed_rows_stay_near_the_old_ones(spectrum: str) -> None:
    """Of all bases of the new space the nearest is taken; its own order, the negative control, is far."""
    gradient = gradient_of(spectrum)
    basis = first_basis(gradient, RANK, source())
    shuffled = basis[torch.randperm(RANK, generator=generator(5))] * torch.randn(RANK, 1, generator=generator(6)).sign()
    refreshed = refresh_basis(gradient, shuffled)
    nearness = (refreshed * shuffled).sum(1)
    fresh = first_basis(gradient, RANK, source(7))
    assert float(nearness.min()) > 0.8
    assert float((fresh * shuffled).sum(1).min()) < 0.5
    # The polar factor: the matrix of products between new and old rows is symmetric and positive.
    products = refreshed @ shuffled.t()
    assert torch.allclose(products, products.t(), atol=1e-4)
    assert float(torch.linalg.eigvalsh(products.double()).min()) > 0


@pytest.mark.parametrize("true_rank", [0, 1, RANK - 1], ids=["zero", "rank-1", "rank-15"])
def test_gradients_of_lower_rank_still_give_orthonormal_rows_that_hold_them(true_rank: int) -> None:
    g = generator(8)
    gradient = torch.randn(M, true_rank, generator=g) @ torch.randn(true_rank, N, generator=g)
    basis = first_basis(gradient, RANK, source())
    refreshed = refresh_basis(gradient, random_basis(RANK, N, source(9), CPU))
    for found in (basis, refreshed):
        assert_orthonormal(found)
        if true_rank:
            assert energy(found, gradient) >= 1 - 1e-5


@pytest.mark.parametrize("tokens", [1, 5, 40, 3000], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_give_the_basis_of_their_product(tokens: int, dtype: torch.dtype) -> None:
    """Also with fewer tokens than rows of the basis, and over several bands of 16-bit tokens."""
    g = generator(3)
    decay = 0.8 ** torch.arange(N)
    dy, x = torch.randn(tokens, M, generator=g).to(dtype), (torch.randn(tokens, N, generator=g) * decay).to(dtype)
    factored = FactoredGradient(dy, x)
    gradient = dy.float().t() @ x.float()
    assert factored.shape == gradient.shape
    torch.testing.assert_close(factored.formed(), gradient, rtol=1e-4, atol=1e-4)
    first = first_basis(factored, RANK, source())
    old = random_basis(RANK, N, source(9), CPU)
    for found in (first, refresh_basis(factored, first), refresh_basis(factored, old)):
        assert_orthonormal(found)
    for found, wanted in (
        (first, first_basis(gradient, RANK, source())),
        (refresh_basis(factored, old), refresh_basis(gradient, old)),
    ):
        assert energy(found, gradient) == pytest.approx(energy(wanted, gradient), abs=1e-4)
    assert energy(first, gradient) >= BASIS_ENERGY


@pytest.mark.parametrize(
    ("tokens", "rows", "formed"), [(100, 8, False), (100, 400, False), (10_000, 8, False), (10_000, 400, True)]
)
def test_the_cheaper_of_factors_and_gradient_is_taken(tokens: int, rows: int, formed: bool) -> None:
    """Operations, counted by hand: products through the factors against forming G once and products with it."""
    factored = FactoredGradient(torch.zeros(tokens, M), torch.zeros(tokens, N))
    assert ((tokens + rows) * M * N < rows * tokens * (M + N)) is formed
    assert isinstance(cheaper(factored, rows), Tensor) is formed


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_bad_gradients_give_random_first_directions_and_leave_old_ones(bad: float) -> None:
    gradient = gradient_of("power-law")
    gradient[7, 9] = bad
    first = first_basis(gradient, RANK, source())
    assert_orthonormal(first)
    assert torch.equal(refresh_basis(gradient, first), first)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30], ids=str)
def test_a_basis_does_not_depend_on_the_gradients_scale(scale: float) -> None:
    gradient = gradient_of("geometric")
    scaled = gradient * scale
    basis = first_basis(scaled, RANK, source())
    for found in (basis, refresh_basis(scaled, basis)):
        assert_orthonormal(found)
        assert energy(found, gradient) >= BASIS_ENERGY


@pytest.mark.parametrize("shape", [(RANK, N), (M, RANK), (RANK, RANK), (RANK + 3, N)], ids=str)
def test_a_rank_as_large_as_the_matrix_is_allowed(shape: tuple[int, int]) -> None:
    gradient = torch.randn(*shape, generator=generator())
    basis = first_basis(gradient, RANK, source())
    for found in (basis, refresh_basis(gradient, basis)):
        assert found.shape == (RANK, shape[1])
        assert_orthonormal(found)
        assert energy(found, gradient) >= BASIS_ENERGY


def test_the_first_basis_is_a_function_of_gradient_and_source() -> None:
    gradient = gradient_of("power-law")
    one, two, other = (first_basis(gradient, RANK, source(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_bases_are_float32_whatever_the_default_dtype() -> None:
    gradient = gradient_of("power-law")
    wanted = first_basis(gradient, RANK, source()), random_basis(RANK, N, source(), CPU)
    torch.set_default_dtype(torch.bfloat16)
    try:
        given = first_basis(gradient, RANK, source()), random_basis(RANK, N, source(), CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(wanted, given))


def few_tokens(seed: int) -> FactoredGradient:
    """Return a gradient of 60 tokens, whose sizes fall by seven decades, for a matrix [300, 256]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 256, generator=generator) * torch.logspace(0, -1, 256)
    return FactoredGradient(torch.randn(60, 300, generator=generator) * torch.logspace(0, -7, 60)[:, None], x)


@pytest.mark.parametrize("seed", range(12))
def test_a_basis_of_more_directions_than_tokens_is_found(seed: int) -> None:
    """What fills it up may nearly cancel what is there: no Gram matrix of that is left indefinite."""
    found = find_first(few_tokens(seed), 256, RandomRows(seed, 1))
    assert bool(found.usable)
    assert float(deviation(found.basis)) < FILLED_UP


@pytest.mark.parametrize("refresh", [False, True], ids=["first", "refreshed"])
def test_a_basis_that_came_out_broken_is_not_taken(refresh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN in it would reach the weight with the next fold, whatever the slot holds."""
    monkeypatch.setattr(range_finder, "orthonormal_rows", lambda rows, fill: torch.full_like(rows, torch.nan))
    old = torch.eye(8, 256).flip(0)
    source = RandomRows(0, 1)
    found = find_refreshed(few_tokens(0), old, source) if refresh else find_first(few_tokens(0), 8, source)
    assert not bool(found.usable)
    assert torch.equal(found.basis, old if refresh else torch.eye(8, 256))
