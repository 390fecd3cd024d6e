"""Folding a slot into its weight is W ← decay · W + Bᵀ P, rounded once and fairly."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import FLOAT32_ROUNDING, PRODUCT, STANDARD_ERRORS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lisa_kernels.errors import InputError
from lisa_kernels.ops.fold import fold_, reference

SHAPES = [(1, 1, 1), (5, 7, 3), (64, 96, 8), (255, 257, 4)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fold(weight: Tensor, left: Tensor, right: Tensor, decay: float = 1.0, clock: int = 1, **options: object) -> Tensor:
    """Fold into a copy of `weight` and return it."""
    folded = weight.clone()
    device = weight.device
    fold_(
        folded, left, right, decay=torch.full((), decay, device=device),
        clock=torch.full((), clock, dtype=torch.int64, device=device), **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return folded


@pytest.mark.parametrize("decay", [1.0, 0.999, 0.0], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_float32_weight_becomes_the_float64_formula(
    shape: tuple[int, int, int], decay: float, device: torch.device
) -> None:
    m, n, rank = shape
    weight, slot, basis = (t.to(device) for t in (normal(m, n), normal(rank, m, seed=1), normal(rank, n, seed=2)))
    exact = decay * weight.double() + slot.double().t() @ basis.double()
    magnitude = decay * weight.double().abs() + slot.double().abs().t() @ basis.double().abs()
    error = (fold(weight, slot, basis, decay).double() - exact).abs()
    assert bool((error <= (PRODUCT + 2 * FLOAT32_ROUNDING) * magnitude).all())


def test_a_transposed_weight_is_folded_with_slot_and_basis_swapped() -> None:
    weight, slot, basis = normal(48, 64), normal(4, 48, seed=1), normal(4, 64, seed=2)
    plain = fold(weight, slot, basis, 0.9)
    transposed = fold(weight.t().contiguous(), basis, slot, 0.9)
    assert torch.allclose(transposed.t(), plain, rtol=0, atol=PRODUCT * 10)


def test_a_strided_weight_is_folded_in_place() -> None:
    weight, slot, basis = normal(48, 64), normal(4, 48, seed=1), normal(4, 64, seed=2)
    strided = weight.t().contiguous().t()
    decay, clock = torch.tensor(0.9), torch.tensor(1)
    fold_(strided, slot, basis, decay=decay, clock=clock)
    assert torch.equal(strided, fold(weight, slot, basis, 0.9))


@pytest.mark.parametrize("slot_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_rounding_is_unbiased(slot_dtype: torch.dtype) -> None:
    """An update of a thousandth of the spacing survives in the mean; to nearest, the negative control, it is lost."""
    weight = torch.ones(256, 256, dtype=torch.bfloat16)
    slot = torch.full((1, 256), 2.0**-17, dtype=slot_dtype)
    basis = torch.ones(1, 256, dtype=slot_dtype)
    moved = (fold(weight, slot, basis).double() - 1.0).flatten()
    standard_error = float(moved.std()) / math.sqrt(moved.numel())
    assert abs(float(moved.mean()) - 2.0**-17) <= STANDARD_ERRORS * standard_error
    assert float(moved.mean()) > STANDARD_ERRORS * standard_error
    assert torch.equal(fold(weight, slot, basis, stochastic=False), weight)


def test_a_decay_below_the_spacing_of_bfloat16_survives_in_the_mean() -> None:
    weight = torch.full((256, 256), 1.5, dtype=torch.bfloat16)
    nothing = torch.zeros(1, 256)
    moved = (fold(weight, nothing, nothing, decay=1 - 2.0**-14).double() - 1.5).flatten()
    standard_error = float(moved.std()) / math.sqrt(moved.numel())
    assert abs(float(moved.mean()) + 1.5 * 2.0**-14) <= STANDARD_ERRORS * standard_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_result_does_not_depend_on_the_band_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers make every product exact, so that only the rounding and its random numbers can differ."""
    weight = normal(100, 130, dtype=dtype)
    slot, basis = normal(4, 100, seed=1).mul(4).round() / 64, normal(4, 130, seed=2).mul(4).round() / 64
    results = []
    for elements in (1 << 20, 1, 1000, 130 * 33):
        monkeypatch.setattr(reference, "BAND_ELEMENTS", elements)
        folded = weight.clone()
        reference.fold_(folded, slot, basis, torch.tensor(0.5), torch.tensor(3), True, 1, 2)
        results.append(folded)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"parameter": 1}, {"clock": 2}], ids=lambda changed: next(iter(changed))
)
def test_seed_parameter_and_clock_each_change_the_rounding(changed: dict[str, int]) -> None:
    weight, slot, basis = normal(64, 64, dtype=torch.bfloat16), normal(4, 64, seed=1), normal(4, 64, seed=2)
    assert torch.equal(fold(weight, slot, basis), fold(weight, slot, basis))
    assert not torch.equal(fold(weight, slot, basis), fold(weight, slot, basis, **changed))  # type: ignore[arg-type]


def test_slot_and_basis_are_left_alone() -> None:
    slot, basis = normal(4, 48, seed=1), normal(4, 64, seed=2)
    fold(normal(48, 64), slot, basis)
    assert torch.equal(slot, normal(4, 48, seed=1))
    assert torch.equal(basis, normal(4, 64, seed=2))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)], ids=str)
def test_an_empty_weight_is_no_error(shape: tuple[int, int]) -> None:
    weight = torch.empty(shape)
    assert fold(weight, torch.ones(2, shape[0]), torch.ones(2, shape[1])).shape == shape


def test_the_definition_runs_on_fake_tensors_and_so_reads_nothing_on_the_host() -> None:
    with FakeTensorMode():
        decay, clock = torch.ones(()), torch.ones((), dtype=torch.int64)
        weight = torch.ones(8, 16, dtype=torch.bfloat16)
        reference.fold_(weight, torch.ones(2, 8), torch.ones(2, 16), decay, clock, True, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operation_passes_torchs_own_checks(dtype: torch.dtype) -> None:
    arguments = (
        normal(8, 16, dtype=dtype),
        normal(2, 8),
        normal(2, 16),
        torch.tensor(0.9),
        torch.tensor(1),
        True,
        0,
        0,
    )
    torch.library.opcheck(torch.ops.lisa_kernels.fold_, arguments)


@pytest.mark.parametrize(
    ("left", "right"),
    [((2, 9), (2, 16)), ((2, 8), (2, 15)), ((2, 8), (3, 16)), ((8,), (2, 16)), ((2, 16), (2, 8))],
    ids=["left", "right", "ranks", "vector", "swapped"],
)
def test_shapes_that_do_not_fit_are_refused(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"into a weight \[8, 16\]; \[r, 8\] and \[r, 16\]"):
        fold(torch.zeros(8, 16), torch.zeros(left), torch.zeros(right))
