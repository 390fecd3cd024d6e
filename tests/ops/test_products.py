"""16-bit products on CPUs are float32 products rounded once, tile by tile, in bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_kernels.ops.lowrank_linear import linear, products
from lisa_kernels.ops.lowrank_linear.products import is_slow, matmul, sum_of_outer_products, weight_gradient_in

HALVES = [torch.bfloat16, torch.float16]
# Tokens, outputs and inputs that end in the middle of tiles, and single rows and columns.
SHAPES = [(35, 48, 64), (1, 300, 70), (70, 33, 1), (129, 1, 40), (3, 257, 129)]


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the tiled path on every CPU, with tiles that these small matrices cross."""
    monkeypatch.setattr(products, "has_matrix_units", lambda dtype: False)
    monkeypatch.setattr(products, "TILE_ELEMENTS", 2048)
    monkeypatch.setattr(products, "ROW_ELEMENTS", 4096)


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def within_one_rounding(given: Tensor, exact: Tensor) -> bool:
    """Return whether each element is the exact one rounded to its dtype, give or take what float32 sums lose."""
    tolerance = torch.finfo(given.dtype).eps * exact.abs() + 1e-5 * exact.abs().amax()
    return bool(((given.double() - exact).abs() <= tolerance).all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("tokens", "m", "n"), SHAPES, ids=str)
def test_products_are_rounded_once(tokens: int, m: int, n: int, dtype: torch.dtype) -> None:
    x, weight = normal(tokens, n, seed=1, dtype=dtype), normal(m, n, seed=2, dtype=dtype)
    dy = normal(tokens, m, seed=3, dtype=dtype)
    assert within_one_rounding(matmul(x, weight.t()), x.double() @ weight.double().t())
    assert within_one_rounding(matmul(dy, weight), dy.double() @ weight.double())
    assert within_one_rounding(weight_gradient_in(dtype, dy, x), dy.double().t() @ x.double())
    exact = dy.double().t() @ x.double()
    assert float((sum_of_outer_products(dy, x) - exact).norm() / exact.norm()) <= 1e-6


def test_rounding_every_tile_would_be_seen() -> None:
    """Negative control: sums kept in bfloat16 between tiles."""
    dy, weight = normal(35, 257, seed=1, dtype=torch.bfloat16), normal(257, 64, seed=2, dtype=torch.bfloat16)
    total = torch.zeros(35, 64, dtype=torch.bfloat16)
    for start in range(0, 257, 32):
        total += (dy[:, start : start + 32].float() @ weight[start : start + 32].float()).bfloat16()
    assert not within_one_rounding(total, dy.double() @ weight.double())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("trained", [True, False], ids=["full", "frozen"])
def test_a_plain_layer_has_the_gradients_of_torchs_linear(trained: bool, bias: bool, dtype: torch.dtype) -> None:
    x = normal(2, 9, 40, seed=1, dtype=dtype).requires_grad_()
    weight = normal(24, 40, seed=2, dtype=dtype).requires_grad_(trained)
    offset = normal(24, seed=3, dtype=dtype).requires_grad_() if bias else None
    leaves = [leaf for leaf in (x, weight, offset) if leaf is not None and leaf.requires_grad]
    y, plain = linear(x, weight, offset), torch.nn.functional.linear(x, weight, offset)
    dy = normal(2, 9, 24, seed=4, dtype=dtype)
    for given, other in zip([y, *torch.autograd.grad(y, leaves, dy)], [plain, *torch.autograd.grad(plain, leaves, dy)]):
        assert given.dtype == other.dtype
        # Each is rounded on its own, torch's perhaps more than once.
        torch.testing.assert_close(given, other, rtol=4 * torch.finfo(dtype).eps, atol=0.05)


def test_what_needs_no_gradient_is_neither_saved_nor_formed() -> None:
    saved: list[Tensor] = []
    weight = normal(24, 40, seed=2, dtype=torch.bfloat16)
    x = normal(9, 40, seed=1, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x, weight, None).sum().backward()
    assert [tensor.data_ptr() for tensor in saved] == [weight.data_ptr()]
    assert weight.grad is None


def test_float32_and_cpus_with_matrix_units_take_torchs_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(9, 40, seed=1, dtype=torch.bfloat16), normal(24, 40, seed=2, dtype=torch.bfloat16)
    assert not is_slow(x.float())
    assert is_slow(x)
    monkeypatch.setattr(products, "has_matrix_units", lambda dtype: True)
    assert torch.equal(matmul(x, weight.t()), x @ weight.t())
    assert torch.equal(linear(x, weight, None), torch.nn.functional.linear(x, weight))


class Largest(TorchDispatchMode):
    """Notes the largest float32 storage that any operation returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result


def test_no_operand_exists_in_float32_as_a_whole() -> None:
    x, weight = normal(200, 96, seed=1, dtype=torch.bfloat16), normal(120, 96, seed=2, dtype=torch.bfloat16)
    dy = normal(200, 120, seed=3, dtype=torch.bfloat16)
    with Largest() as largest:
        matmul(x, weight.t())
        matmul(dy, weight)
        weight_gradient_in(torch.bfloat16, dy, x)
    assert 0 < largest.elements < min(weight.numel(), x.numel())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["full", "frozen"])
def test_the_operations_pass_torchs_own_checks(trained: bool, dtype: torch.dtype) -> None:
    x = normal(2, 3, 40, seed=1, dtype=dtype).requires_grad_()
    weight = normal(24, 40, seed=2, dtype=dtype).requires_grad_(trained)
    torch.library.opcheck(torch.ops.lisa_kernels.linear, (x, weight, None))
    dy = normal(2, 3, 24, seed=4, dtype=dtype)
    arguments = (dy, weight.detach(), x.detach() if trained else None, not trained)
    torch.library.opcheck(torch.ops.lisa_kernels.linear_backward, arguments)
