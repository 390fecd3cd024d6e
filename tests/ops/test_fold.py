"""Folding a slot into its weight is W ← decay · W + Bᵀ P, rounded once and fairly."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tolerances import FLOAT32_ROUNDING, PRODUCT, STANDARD_ERRORS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lisa_kernels.errors import InputError
from lisa_kernels.ops.fold import fold_, master_weight, reference
from lisa_kernels.ops.random_bits import random_key

SHAPES = [(1, 1, 1), (5, 7, 3), (64, 96, 8), (255, 257, 4)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fold(
    weight: Tensor, left: Tensor, right: Tensor, decay: float = 1.0, clock: int = 1, seed: int = 0, parameter: int = 0,
    stochastic: bool = True, remainder: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fold into a copy of `weight` and return it."""
    folded = weight.clone()
    key = random_key(seed, parameter, torch.full((), clock, dtype=torch.int64, device=weight.device))
    rate = torch.full((), decay, device=weight.device)
    fold_(folded, left, right, decay=rate, key=key if stochastic else None, remainder=remainder)
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
    fold_(strided, slot, basis, decay=torch.tensor(0.9))
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


@pytest.mark.parametrize("size", [1.0, 2.0**-13, 2.0**-16], ids=["ordinary", "smallest normal", "subnormal"])
def test_float16_rounding_is_unbiased(size: float) -> None:
    """An update of a hundredth of the spacing survives in the mean, also among subnormals; to nearest it is lost."""
    weight = torch.full((256, 256), size, dtype=torch.float16)
    update = max(size, 2.0**-14) * 2.0**-17
    slot, basis = torch.full((1, 256), update), torch.ones(1, 256)
    moved = (fold(weight, slot, basis).double() - size).flatten()
    standard_error = float(moved.std()) / math.sqrt(moved.numel())
    assert abs(float(moved.mean()) - update) <= STANDARD_ERRORS * standard_error
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
        reference.fold_(folded, slot, basis, torch.tensor(0.5), random_key(1, 2, torch.tensor(3)))
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
        decay, key = torch.ones(()), torch.ones((), dtype=torch.int64)
        weight = torch.ones(8, 16, dtype=torch.bfloat16)
        reference.fold_(weight, torch.ones(2, 8), torch.ones(2, 16), decay, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operation_passes_torchs_own_checks(dtype: torch.dtype) -> None:
    arguments = (
        normal(8, 16, dtype=dtype),
        normal(2, 8),
        normal(2, 16),
        torch.tensor(0.9),
        torch.tensor(1),
    )
    torch.library.opcheck(torch.ops.lisa_kernels.fold_, arguments)
    if dtype == torch.bfloat16:
        torch.library.opcheck(torch.ops.lisa_kernels.fold_, (*arguments, torch.zeros(8, 16, dtype=torch.int16)))


def test_a_weight_and_its_remainder_are_any_float32_master() -> None:
    """Patterns of all exponents and signs come back bit for bit, and the weight is the nearest bfloat16."""
    random = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    halves = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 1, 0], dtype=torch.int32)
    masters = torch.cat([random, halves, halves | -(2**31)]).view(torch.float32)
    masters = masters[masters.isfinite()]
    weight, remainder = reference.split(masters)
    assert torch.equal(master_weight(weight, remainder).view(torch.int32), masters.view(torch.int32))
    nearest, inner = masters.to(torch.bfloat16), masters.abs() < 3e38
    tie = (masters.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[inner & ~tie].view(torch.int16), nearest[inner & ~tie].view(torch.int16))
    assert bool((weight[tie & inner].float().abs() > masters[tie & inner].abs()).all())


def test_a_remainder_of_zeros_leaves_the_weight_as_it_is() -> None:
    weight = normal(16, 16, dtype=torch.bfloat16)
    assert torch.equal(master_weight(weight, torch.zeros(16, 16, dtype=torch.int16)), weight.float())


def test_masters_take_the_steps_that_a_float32_weight_takes() -> None:
    """Over 50 folds, none of which alone would move a bfloat16 weight; nothing depends on seed or clock."""
    weight = normal(48, 64, dtype=torch.bfloat16)
    whole, remainder = weight.float(), torch.zeros(48, 64, dtype=torch.int16)
    start = weight.clone()
    for clock in range(50):
        slot, basis = normal(4, 48, seed=clock) * 1e-5, normal(4, 64, seed=100 + clock)
        decay = torch.tensor(1 - 1e-5)
        fold_(whole, slot, basis, decay=decay, key=random_key(0, 0, torch.tensor(clock)))
        fold_(weight, slot, basis, decay=decay, key=random_key(clock, 0, torch.tensor(7)), remainder=remainder)
    assert torch.equal(master_weight(weight, remainder), whole)
    assert torch.equal(weight, reference.split(whole)[0])
    assert not torch.equal(weight, start)


def test_a_strided_master_is_folded_in_place() -> None:
    weight, slot, basis = normal(48, 64, dtype=torch.bfloat16), normal(4, 48, seed=1), normal(4, 64, seed=2)
    plain, rest = weight.clone(), torch.zeros(48, 64, dtype=torch.int16)
    strided, lower = weight.t().contiguous().t(), rest.t().contiguous().t()
    for given, remainder in ((plain, rest), (strided, lower)):
        fold_(given, slot, basis, decay=torch.tensor(0.9), remainder=remainder)
    assert torch.equal(strided, plain)
    assert torch.equal(lower, rest)


@pytest.mark.parametrize(
    ("dtype", "remainder"),
    [(torch.float32, torch.zeros(8, 16, dtype=torch.int16)), (torch.bfloat16, torch.zeros(8, 16, dtype=torch.int32)),
     (torch.bfloat16, torch.zeros(16, 8, dtype=torch.int16))],
    ids=["float32 weight", "int32 remainder", "other shape"],
)  # fmt: skip
def test_a_remainder_that_does_not_fit_is_refused(dtype: torch.dtype, remainder: Tensor) -> None:
    with pytest.raises(InputError, match="int16 beside bfloat16 of the same shape is wanted"):
        fold(torch.zeros(8, 16, dtype=dtype), torch.zeros(2, 8), torch.zeros(2, 16), remainder=remainder)


@pytest.mark.parametrize(
    ("left", "right"),
    [((2, 9), (2, 16)), ((2, 8), (2, 15)), ((2, 8), (3, 16)), ((8,), (2, 16)), ((2, 16), (2, 8))],
    ids=["left", "right", "ranks", "vector", "swapped"],
)
def test_shapes_that_do_not_fit_are_refused(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"into a weight \[8, 16\]; \[r, 8\] and \[r, 16\]"):
        fold(torch.zeros(8, 16), torch.zeros(left), torch.zeros(right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fold_rows", [fold_, reference.fold_], ids=["operation", "definition"])
def test_rows_of_a_weight_become_what_the_whole_does(fold_rows: Callable[..., None], dtype: torch.dtype) -> None:
    """Bit for bit where they say where they begin; rows that do not are rounded by others' random numbers."""
    weight, slot, basis = normal(48, 66, dtype=dtype), normal(4, 48, seed=1), normal(4, 66, seed=2)
    decay, key = torch.tensor(0.9), random_key(1, 2, torch.tensor(3))
    whole, upper, lower, stray = weight.clone(), weight[:10].clone(), weight[10:].clone(), weight[10:].clone()
    for rows, part, start in ((whole, slot, 0), (upper, slot[:, :10], 0), (lower, slot[:, 10:], 660)):
        fold_rows(rows, part, basis, decay=decay, key=key, start=start)
    fold_rows(stray, slot[:, 10:], basis, decay=decay, key=key)
    assert torch.equal(torch.cat([upper, lower]), whole)
    assert torch.equal(stray, lower) == (dtype == torch.float32)


def test_rows_that_begin_within_a_hash_of_random_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="start at element 6 of the whole weight; a multiple of 4 is wanted"):
        fold_(torch.zeros(2, 6), torch.zeros(1, 2), torch.zeros(1, 6), decay=torch.tensor(1.0), start=6)
