"""Projecting a gradient on a basis is R = P Gᵀ in float32, whatever the dtypes and however G is stored."""

from __future__ import annotations

import pytest
import torch
from tolerances import PRODUCT, product_of_parts
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lisa_kernels.errors import InputError
from lisa_kernels.ops.project import project, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error_over_bound(result: Tensor, basis: Tensor, gradient: Tensor) -> float:
    """Return the largest error of a result, over what a float32 sum of these magnitudes may err by on its device."""
    bound = PRODUCT if result.device.type == "cpu" else product_of_parts(basis.dtype, gradient.dtype, basis.shape[1])
    exact, magnitude = basis.double() @ gradient.double().t(), basis.double().abs() @ gradient.double().abs().t()
    return float(((result.double() - exact).abs() / (bound * magnitude)).max())


@pytest.mark.parametrize("transposed", [False, True], ids=["dense", "transposed"])
@pytest.mark.parametrize("gradient_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("basis_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 33, 257), (48, 65, 300)], ids=str)
def test_a_projection_is_the_float64_product(
    shape: tuple[int, int, int], basis_dtype: torch.dtype, gradient_dtype: torch.dtype, transposed: bool,
    device: torch.device,
) -> None:  # fmt: skip
    rank, m, n = shape
    basis = normal(rank, n, seed=1, dtype=basis_dtype).to(device)
    gradient = normal(m, n, seed=2, dtype=gradient_dtype).to(device)
    given = gradient.t().contiguous().t() if transposed else gradient
    result = project(basis, given)
    assert (result.shape, result.dtype) == ((rank, m), torch.float32)
    assert error_over_bound(result, basis, gradient) <= 1


def test_a_sum_in_16_bits_is_seen() -> None:
    """Negative control of the bound."""
    basis, gradient = normal(48, 300, seed=1).bfloat16(), normal(65, 300, seed=2).bfloat16()
    assert error_over_bound(basis @ gradient.t(), basis, gradient) > 100


def test_the_result_does_not_depend_on_the_band_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers make all sums exact."""
    basis, gradient = normal(8, 130, seed=1).mul(4).round(), normal(100, 130, seed=2).mul(4).round()
    results = []
    for elements in (1 << 20, 1, 1000):
        monkeypatch.setattr(reference, "BAND_ELEMENTS", elements)
        results.append(reference.project(basis, gradient))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)], ids=str)
def test_an_empty_gradient_is_no_error(shape: tuple[int, int], device: torch.device) -> None:
    result = project(torch.ones(2, shape[1], device=device), torch.ones(shape, device=device))
    assert torch.equal(result.cpu(), torch.zeros(2, shape[0]))


def test_the_definition_runs_on_fake_tensors() -> None:
    with FakeTensorMode():
        assert project(torch.ones(2, 16), torch.ones(8, 16, dtype=torch.bfloat16)).shape == (2, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operation_passes_torchs_own_checks(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.lisa_kernels.project, (normal(2, 16, dtype=dtype), normal(8, 16, seed=1)))


@pytest.mark.parametrize(
    ("basis", "gradient"), [((2, 15), (8, 16)), ((16,), (8, 16)), ((2, 16), (16,)), ((2, 8), (8, 16))],
    ids=["columns", "vector of a basis", "vector of a gradient", "transposed"],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(basis: tuple[int, ...], gradient: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"cannot project a gradient .* on a basis"):
        project(torch.zeros(basis), torch.zeros(gradient))
