"""The largest magnitude and the sum of squares of many gradients, whatever their dtypes and sizes."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import SQUARES_OF_A_TILE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lisa_kernels.errors import InputError
from lisa_kernels.ops.grad_norm import grad_norm, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 255, 256, 257, 4097, 70000]
# Sums of up to 70,000 squares in float64, in another order; on GPUs a tile is summed in float32.
SUM = {"cpu": 70000 * 2.0**-53, "cuda": SQUARES_OF_A_TILE}


def gradients(device: torch.device, sizes: list[int] | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [
        (torch.randn(n, generator=generator) * 10 ** (index % 5 - 2)).to(device, DTYPES[index % 3])
        for index, n in enumerate(sizes or SIZES)
    ]


def exact(grads: list[Tensor]) -> tuple[float, float]:
    values = torch.cat([grad.double().flatten() for grad in grads])
    return float(values.abs().max()), float((values**2).sum())


@pytest.mark.parametrize("n", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_tensor_is_measured_exactly(n: int, dtype: torch.dtype, device: torch.device) -> None:
    grad = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(device, dtype)
    largest, squares = grad_norm([grad]).tolist()
    assert largest == exact([grad])[0]
    assert squares == pytest.approx(exact([grad])[1], rel=SUM[device.type], abs=0)


def test_many_tensors_of_mixed_dtypes_are_measured_together(device: torch.device) -> None:
    grads = gradients(device)
    largest, squares = grad_norm(grads).tolist()
    assert largest == exact(grads)[0]
    assert squares == pytest.approx(exact(grads)[1], rel=SUM[device.type], abs=0)


def test_one_element_that_is_left_out_is_seen(device: torch.device) -> None:
    """Negative control of the bounds, the wider one of GPUs too."""
    grad = torch.ones(70000, device=device)
    assert float(grad_norm([grad[1:]])[1]) != pytest.approx(70000.0, rel=SUM[device.type], abs=0)


def test_the_sum_is_left_out_unless_asked_for(device: torch.device) -> None:
    grads = gradients(device)
    assert grad_norm(grads, squares=False).tolist() == [exact(grads)[0], 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [0, 8, 4095, 4096], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_one_value_that_is_not_finite_shows(
    bad: float, position: int, dtype: torch.dtype, device: torch.device
) -> None:
    grad = torch.randn(4097, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    grad[position] = bad
    for squares in (False, True):
        largest = float(grad_norm([torch.zeros(5, device=device), grad], squares=squares)[0])
        assert math.isnan(largest) if math.isnan(bad) else largest == math.inf


def test_a_nan_outlasts_an_infinity(device: torch.device) -> None:
    grads = [torch.tensor([math.inf, math.nan], device=device), torch.tensor([math.inf], device=device)]
    assert math.isnan(float(grad_norm(grads)[0]))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e18, 1e30], ids=str)
def test_squares_neither_overflow_nor_vanish(scale: float, device: torch.device) -> None:
    grad = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(device) * scale
    assert float(grad_norm([grad])[1]) == pytest.approx(exact([grad])[1], rel=SUM[device.type], abs=0)


def test_the_result_is_the_same_for_every_number_of_threads() -> None:
    grads = gradients(torch.device("cpu"), [300_000, 7, 123_457])
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(grad_norm(grads).tolist())
    torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


def test_views_that_are_not_contiguous_are_measured(device: torch.device) -> None:
    grad = torch.arange(12.0, device=device).view(3, 4)[:, ::2]
    assert grad_norm([grad]).tolist() == list(exact([grad]))


def test_the_definition_takes_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = gradients(torch.device("cpu"))
    whole = reference.grad_norm(grads, True)
    monkeypatch.setattr(reference, "CHUNK", 100)
    assert reference.grad_norm(grads, True).tolist() == pytest.approx(whole.tolist(), rel=SUM["cpu"], abs=0)


def test_fake_tensors_pass(device: torch.device) -> None:
    with FakeTensorMode():
        result = grad_norm([torch.zeros(5, device=device)])
    assert (result.shape, result.dtype) == ((2,), torch.float64)


@pytest.mark.parametrize(
    ("grads", "words"),
    [
        pytest.param([], "no gradients", id="none"),
        pytest.param([torch.zeros(3, dtype=torch.int32)], "int32.*wanted", id="integers"),
        pytest.param([torch.zeros(3, dtype=torch.complex64)], "complex64.*wanted", id="complex"),
        pytest.param([torch.zeros(3), torch.zeros(3).to_sparse()], "sparse.*wanted", id="sparse"),
        pytest.param([torch.zeros(3), torch.zeros(3, device="meta")], "meta.*cpu.*wanted", id="devices"),
    ],
)
def test_wrong_gradients_are_refused(grads: list[Tensor], words: str) -> None:
    with pytest.raises(InputError, match=words):
        grad_norm(grads)
