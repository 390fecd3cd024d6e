"""The low-rank layer computes the explicit formula, and its backward is the projected gradient at a fraction of x."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import BFLOAT16_PRODUCT, PRODUCT
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lisa_kernels.ops.lowrank_linear import capture_linear, lowrank_linear
from lisa_kernels.ops.lowrank_linear.reference import weight_gradient

M, N, RANK, TOKENS = 48, 64, 8, 35
LEADING = [(TOKENS,), (5, 7), (1, 5, 7)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def orthonormal(rank: int = RANK, columns: int = N) -> Tensor:
    return torch.linalg.qr(normal(columns, rank, seed=9))[0].t().contiguous()


class Layer:
    """Leaves of one layer and what comes out of it."""

    def __init__(
        self, *, leading: tuple[int, ...] = (5, 7), bias: bool = True, zero_slot: bool = False,
        dtype: torch.dtype = torch.float32, trained_basis: bool = False,
    ) -> None:  # fmt: skip
        self.x = normal(*leading, N, seed=1, dtype=dtype).requires_grad_()
        self.weight = normal(M, N, seed=2, dtype=dtype) / 8
        self.bias = normal(M, seed=3, dtype=dtype).requires_grad_() if bias else None
        self.slot = (normal(RANK, M, seed=4) * (0.0 if zero_slot else 1.0)).requires_grad_()
        self.basis = orthonormal().requires_grad_() if trained_basis else orthonormal().to(dtype)
        self.dy = normal(*leading, M, seed=5, dtype=dtype)

    def leaves(self) -> list[Tensor]:
        leaves = [leaf for leaf in (self.x, self.bias, self.slot) if leaf is not None]
        return [self.basis, *leaves] if self.basis.requires_grad else leaves

    def forward(self, scale: float = 1.0, slot_is_zero: bool = False) -> Tensor:
        return lowrank_linear(self.x, self.weight, self.bias, self.slot, self.basis, scale, slot_is_zero)

    def exact(self, scale: float = 1.0) -> tuple[Tensor, list[Tensor]]:
        """Return y and the gradients of the leaves by autograd of the explicit formula in float64."""
        x, slot = (leaf.detach().double().requires_grad_() for leaf in (self.x, self.slot))
        bias = None if self.bias is None else self.bias.detach().double().requires_grad_()
        basis = self.basis.detach().double().requires_grad_(self.basis.requires_grad)
        y = x @ self.weight.double().t() + scale * (x @ basis.t()) @ slot
        y = y if bias is None else y + bias
        leaves = [leaf for leaf in (x, bias, slot) if leaf is not None]
        leaves = [basis, *leaves] if basis.requires_grad else leaves
        return y.detach(), list(torch.autograd.grad(y, leaves, self.dy.double()))

    def gradients(self, y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(y, self.leaves(), self.dy.to(y.dtype)))


def relative_error(given: Tensor, exact: Tensor) -> float:
    return float((given.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("leading", LEADING, ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("scale", [1.0, 0.25, 16.0], ids=str)
@pytest.mark.parametrize("trained_basis", [False, True], ids=["basis", "trained-basis"])
def test_output_and_gradients_are_those_of_the_explicit_formula(
    leading: tuple[int, ...], bias: bool, scale: float, trained_basis: bool
) -> None:
    layer = Layer(leading=leading, bias=bias, trained_basis=trained_basis)
    y = layer.forward(scale)
    exact_y, exact_gradients = layer.exact(scale)
    assert relative_error(y, exact_y) <= PRODUCT
    gradients = layer.gradients(y)
    assert [g.shape for g in gradients] == [leaf.shape for leaf in layer.leaves()]
    for gradient, exact in zip(gradients, exact_gradients):
        assert relative_error(gradient, exact) <= PRODUCT


def test_the_gradient_check_sees_a_wrong_scale() -> None:
    layer = Layer()
    wrong = layer.gradients(layer.forward(1.01))
    assert relative_error(wrong[-1], layer.exact(1.0)[1][-1]) > PRODUCT


def test_a_slot_known_to_be_zero_gives_the_same_result_without_its_product() -> None:
    layer = Layer(zero_slot=True)
    short, full = layer.forward(slot_is_zero=True), layer.forward(slot_is_zero=False)
    assert torch.equal(short, full)
    for one, other in zip(layer.gradients(short), layer.gradients(full)):
        assert relative_error(one, other.double()) <= PRODUCT


def test_the_promise_of_a_zero_slot_is_taken_at_its_word() -> None:
    layer = Layer()
    assert torch.equal(layer.forward(slot_is_zero=True), torch.nn.functional.linear(layer.x, layer.weight, layer.bias))


def test_the_slots_gradient_is_the_projected_full_gradient() -> None:
    layer = Layer(zero_slot=True)
    gradient = layer.gradients(layer.forward())[-1]
    full = layer.dy.double().reshape(-1, M).t() @ layer.x.detach().double().reshape(-1, N)
    assert relative_error(gradient, layer.basis.double() @ full.t()) <= PRODUCT


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    layer = Layer()
    layer.x.requires_grad_(False)
    y = layer.forward()
    y.backward(layer.dy)
    assert layer.x.grad is None
    assert layer.slot.grad is not None


def test_a_frozen_bias_and_weight_get_no_gradient() -> None:
    layer = Layer()
    assert layer.bias is not None
    layer.bias.requires_grad_(False)
    layer.forward().backward(layer.dy)
    assert layer.bias.grad is None
    assert layer.weight.grad is None


# What the backward keeps


def saved_shapes(build: Any) -> list[tuple[int, ...]]:
    """Return the shapes of all tensors that `build()`'s graph saves."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        build()
    return shapes


@pytest.mark.parametrize("slot_is_zero", [True, False], ids=["zero-slot", "slot"])
def test_the_projection_is_saved_and_the_input_is_not(slot_is_zero: bool) -> None:
    """A plain linear layer with a trained weight, the negative control, saves the input, as does a trained basis."""
    layer = Layer(leading=(TOKENS,))
    kept = saved_shapes(lambda: layer.forward(slot_is_zero=slot_is_zero))
    assert (TOKENS, RANK) in kept
    assert (TOKENS, N) not in kept
    assert ((RANK, M) in kept) is not slot_is_zero
    trained = Layer(leading=(TOKENS,), trained_basis=True)
    assert ((TOKENS, N) in saved_shapes(lambda: trained.forward(slot_is_zero=slot_is_zero))) is not slot_is_zero
    weight = layer.weight.clone().requires_grad_()
    assert (TOKENS, N) in saved_shapes(lambda: torch.nn.functional.linear(layer.x, weight))


def test_gradients_are_the_same_under_checkpointing() -> None:
    layer = Layer()
    plain = layer.gradients(layer.forward())
    y = checkpoint(layer.forward, use_reentrant=False)
    assert all(torch.equal(one, other) for one, other in zip(plain, layer.gradients(y)))


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained_basis", [False, True], ids=["basis", "trained-basis"])
def test_16_bit_layers_give_a_float32_slot_gradient_near_the_formula(dtype: torch.dtype, trained_basis: bool) -> None:
    layer = Layer(dtype=dtype, trained_basis=trained_basis)
    y = layer.forward()
    assert y.dtype == dtype
    exact_y, exact_gradients = layer.exact()
    assert relative_error(y, exact_y) <= BFLOAT16_PRODUCT
    gradients = layer.gradients(y)
    assert gradients[-1].dtype == torch.float32
    assert gradients[0].dtype == (torch.float32 if trained_basis else dtype)
    for gradient, exact in zip(gradients, exact_gradients):
        assert relative_error(gradient, exact) <= BFLOAT16_PRODUCT


@pytest.mark.parametrize("backward_inside", [False, True], ids=["backward-outside", "backward-inside"])
@pytest.mark.parametrize("kind", ["low-rank", "trained-basis", "captured"])
def test_autocast_multiplies_in_bfloat16_and_keeps_the_slots_gradient_in_float32(
    kind: str, backward_inside: bool
) -> None:
    captured = kind == "captured"
    layer = Layer(zero_slot=captured, trained_basis=kind == "trained-basis")
    seen: list[Tensor] = []

    def choose(dy: Tensor, x: Tensor) -> Tensor:
        seen.append(weight_gradient(dy, x))
        return layer.basis

    with torch.autocast("cpu", torch.bfloat16):
        if captured:
            y = capture_linear(layer.x, layer.weight, layer.bias, layer.slot, choose)
        else:
            y = layer.forward()
        gradients = layer.gradients(y) if backward_inside else []
    gradients = gradients or layer.gradients(y)
    assert y.dtype == torch.bfloat16
    exact_y, exact_gradients = layer.exact()
    assert relative_error(y, exact_y) <= BFLOAT16_PRODUCT
    for gradient, exact in zip(gradients, exact_gradients):
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, exact) <= BFLOAT16_PRODUCT
    assert all(gradient.dtype == torch.float32 for gradient in seen)
    # A float32 sum over tokens is no bfloat16 number; one rounded on the way would be.
    for gradient in gradients[-1:] if kind != "trained-basis" else (gradients[-1], gradients[0]):
        assert not torch.equal(gradient, gradient.bfloat16().float())


# Capturing the full gradient


@pytest.mark.parametrize("leading", LEADING, ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_capturing_asks_once_for_a_basis_and_projects_the_gradient_on_it(leading: tuple[int, ...], bias: bool) -> None:
    layer = Layer(leading=leading, bias=bias, zero_slot=True)
    seen: list[Tensor] = []

    def choose(dy: Tensor, x: Tensor) -> Tensor:
        seen.append(weight_gradient(dy, x))
        return layer.basis

    y = capture_linear(layer.x, layer.weight, layer.bias, layer.slot, choose)
    assert seen == []
    gradients = layer.gradients(y)
    full = layer.dy.double().reshape(-1, M).t() @ layer.x.detach().double().reshape(-1, N)
    assert len(seen) == 1
    assert seen[0].dtype == torch.float32
    assert relative_error(seen[0], full) <= PRODUCT
    assert relative_error(gradients[-1], layer.basis.double() @ full.t()) <= PRODUCT
    assert relative_error(y, layer.exact()[0]) <= PRODUCT
    for gradient, exact in zip(gradients, layer.exact()[1]):
        assert relative_error(gradient, exact) <= PRODUCT


def test_capturing_asks_once_under_checkpointing() -> None:
    layer = Layer(zero_slot=True)
    seen: list[Tensor] = []

    def choose(dy: Tensor, x: Tensor) -> Tensor:
        seen.append(x)
        return layer.basis

    def forward(x: Tensor) -> Tensor:
        return capture_linear(x, layer.weight, layer.bias, layer.slot, choose)

    gradients = layer.gradients(checkpoint(forward, layer.x, use_reentrant=False))
    assert len(seen) == 1
    assert relative_error(gradients[-1], layer.exact()[1][-1]) <= PRODUCT


def test_a_frozen_slot_asks_for_no_gradient() -> None:
    layer = Layer(zero_slot=True)
    layer.slot.requires_grad_(False)

    def choose(dy: Tensor, x: Tensor) -> Tensor:
        raise AssertionError("a basis was wanted for a frozen slot")

    capture_linear(layer.x, layer.weight, layer.bias, layer.slot, choose).backward(layer.dy)
    assert layer.x.grad is not None


# torch's own checks


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("kind", ["zero-slot", "slot", "trained-basis"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_forward_operation_passes_torchs_own_checks(bias: bool, kind: str, dtype: torch.dtype) -> None:
    slot_is_zero = kind == "zero-slot"
    layer = Layer(leading=(2, 3), bias=bias, dtype=dtype, trained_basis=kind == "trained-basis")
    arguments = (layer.x, layer.weight, layer.bias, layer.slot, layer.basis, 0.5, slot_is_zero)
    torch.library.opcheck(torch.ops.lisa_kernels.lowrank_linear, arguments)


@pytest.mark.parametrize("needs_dx", [True, False], ids=["dx", "no-dx"])
@pytest.mark.parametrize("kind", ["zero-slot", "slot", "trained-basis"])
def test_the_backward_operation_passes_torchs_own_checks(needs_dx: bool, kind: str) -> None:
    layer = Layer(leading=(2, 3))
    slot, basis = (None, None) if kind == "zero-slot" else (layer.slot.detach(), layer.basis)
    projected = (layer.x @ layer.basis.t()).detach()
    x = layer.x.detach() if kind == "trained-basis" else None
    arguments = (layer.dy, layer.weight, projected, slot, basis, 0.5, needs_dx, x)
    torch.library.opcheck(torch.ops.lisa_kernels.lowrank_linear_backward, arguments)
