"""A linear layer with a slot computes what the plain one does, and keeps its slot out of checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import llama, tokens
from torch import Tensor, nn

from lisa_kernels import LoRAFA, OwLore, attach
from lisa_kernels.basis import BasisTracker, RandomRows, random_basis
from lisa_kernels.layers import LowRankLinear, find_linears, linear_shape, swap_linears

IN, OUT, RANK = 24, 16, 4


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(OUT, IN)


def falcon_linear() -> nn.Module:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    return FalconLinear(IN, OUT)


LINEARS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "no bias": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": conv1d,
    "FalconLinear": falcon_linear,
}


def tracker(gap: int = 0) -> BasisTracker:
    return BasisTracker(rank=RANK, gap=gap, offset=0, seed=0, stream=1)


def basis() -> Tensor:
    return random_basis(RANK, IN, RandomRows(3), torch.device("cpu"))


def matrix_gradient(linear: nn.Module, gradient: Tensor) -> Tensor:
    return gradient if tuple(gradient.shape) == linear_shape(linear) else gradient.t()


@pytest.fixture(params=LINEARS)
def linear(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made = LINEARS[request.param]()
    bias = getattr(made, "bias", None)
    if bias is not None:
        nn.init.normal_(bias)
    return made


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (0, IN)], ids=str)
@pytest.mark.parametrize("state", ["inactive", "capturing", "with basis", "no grad"])
def test_the_output_is_the_plain_layers(linear: nn.Module, shape: tuple[int, ...], state: str) -> None:
    """Whatever the layer's state, a zero slot changes no output, for every kind of linear and shape of input."""
    x = torch.randn(shape)
    expected = linear(x)
    layer = LowRankLinear(linear, RANK, tracker=tracker())
    if state != "inactive":
        layer.activate(basis())
    if state == "capturing":
        layer.arm()
    with torch.set_grad_enabled(state != "no grad"):
        found = layer(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("capturing", [True, False], ids=["capturing", "with basis"])
def test_gradients_are_the_plain_layers_projected(linear: nn.Module, capturing: bool) -> None:
    """dB = P Gᵀ, dX and dbias as of the plain layer."""
    x = torch.randn(2, 7, IN, requires_grad=True)
    dy = torch.randn(2, 7, OUT)
    plain = copy.deepcopy(linear)
    plain(x).backward(dy)
    assert x.grad is not None
    dx, x.grad = x.grad, None
    layer = LowRankLinear(linear, RANK, tracker=tracker())
    layer.activate(basis())
    layer.slot.requires_grad_(True)
    layer.weight.requires_grad_(False)
    if capturing:
        layer.arm()
    layer(x).backward(dy)
    assert isinstance(plain.weight.grad, Tensor)
    gradient = matrix_gradient(plain, plain.weight.grad)
    torch.testing.assert_close(layer.slot.grad, layer.basis @ gradient.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, dx)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    assert layer.weight.grad is None


@pytest.mark.parametrize("capturing", [True, False], ids=["capturing", "with basis"])
def test_models_may_change_the_output_in_place(linear: nn.Module, capturing: bool) -> None:
    """Some models add to a linear's output in place (Falcon); a view out of a custom function would forbid it."""
    layer = LowRankLinear(linear, RANK, tracker=tracker())
    layer.activate(basis())
    layer.slot.requires_grad_(True)
    if capturing:
        layer.arm()
    y = layer(torch.randn(2, 3, IN))
    y += 1.0
    y.sum().backward()
    assert layer.slot.grad is not None


def test_an_adapter_adds_its_slot(linear: nn.Module) -> None:
    """Without a tracker (LoRA-FA) the output is x Wᵀ + b + scale · (x Pᵀ) B, under no_grad too."""
    x = torch.randn(5, IN)
    expected = linear(x)
    layer = LowRankLinear(linear, RANK, scale=0.5)
    layer.activate(basis())
    layer.slot.data.normal_()
    with torch.no_grad():
        found = layer(x)
    torch.testing.assert_close(found, expected + 0.5 * (x @ layer.basis.t()) @ layer.slot, rtol=1e-5, atol=1e-5)


def test_an_inactive_layer_owns_nothing_but_its_weight(linear: nn.Module) -> None:
    """Slot, gradient and basis are empty before activation and after deactivation."""
    layer = LowRankLinear(linear, RANK, tracker=tracker())
    assert layer.slot.untyped_storage().nbytes() == 0
    assert layer.basis.untyped_storage().nbytes() == 0
    layer.activate(basis())
    layer.slot.grad = torch.zeros_like(layer.slot)
    assert layer.slot.dtype == torch.float32
    assert layer.slot.shape == (RANK, OUT)
    layer.deactivate()
    assert layer.slot.untyped_storage().nbytes() == 0
    assert layer.basis.untyped_storage().nbytes() == 0
    assert layer.slot.grad is None


def test_the_basis_has_the_weights_dtype_and_the_slot_stays_float32() -> None:
    """A bfloat16 layer keeps its slot exact."""
    layer = LowRankLinear(nn.Linear(IN, OUT).to(torch.bfloat16), RANK, tracker=tracker())
    layer.activate(basis())
    assert layer.basis.dtype == torch.bfloat16
    assert layer.slot.dtype == torch.float32


@pytest.mark.parametrize("active", [True, False])
def test_state_dicts_are_the_plain_layers(linear: nn.Module, active: bool) -> None:
    """Slot and basis are registered, yet saving gives the plain layer's keys and strict loading wants no others."""
    plain = linear.state_dict()
    layer = LowRankLinear(linear, RANK, tracker=tracker())
    if active:
        layer.activate(basis())
        layer.slot.data.normal_()
    slot, values = layer.slot, layer.slot.detach().clone()
    assert "slot" in dict(layer.named_parameters())
    assert "basis" in dict(layer.named_buffers())
    assert list(layer.state_dict()) == list(plain)
    new = {name: torch.randn_like(value) for name, value in plain.items()}
    layer.load_state_dict(new, strict=True)
    torch.testing.assert_close(layer.state_dict(), new)
    assert layer.slot is slot
    assert torch.equal(layer.slot, values)
    with pytest.raises(RuntimeError, match="extra"):
        layer.load_state_dict({**new, "extra": values}, strict=True)
    with pytest.raises(RuntimeError, match="weight"):
        layer.load_state_dict({}, strict=True)


def test_loading_by_assignment_keeps_the_slot(linear: nn.Module) -> None:
    """`load_state_dict(assign=True)` replaces parameters; the slot the optimizer knows stays the same object."""
    layer = LowRankLinear(linear, RANK, tracker=tracker())
    slot = layer.slot
    layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=True)
    assert layer.slot is slot


def test_hooks_of_the_original_go_on(linear: nn.Module) -> None:
    """Forward hooks with keyword arguments and backward hooks fire before, during and after the swap."""
    seen: list[str] = []
    linear.register_forward_hook(lambda module, args, kwargs, output: seen.append("kwargs"), with_kwargs=True)
    linear.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward"))
    parent = nn.Sequential(linear)
    swaps = swap_linears(
        find_linears({"": parent}, RANK), lambda original, path: LowRankLinear(original, RANK, tracker=tracker())
    )
    parent[0].register_forward_pre_hook(lambda module, args: seen.append("late"))
    parent(torch.randn(2, IN, requires_grad=True)).sum().backward()
    assert sorted(seen) == ["backward", "kwargs", "late"]
    for swap in swaps:
        swap.undo()
    seen.clear()
    parent(torch.randn(2, IN, requires_grad=True)).sum().backward()
    assert sorted(seen) == ["backward", "kwargs", "late"]


class Net(nn.Module):
    """Linears of several sizes, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(IN, OUT)
        self.gate = nn.Linear(IN, 4)
        self.inner = nn.ModuleDict({"small": nn.Linear(10, 9), "again": self.wide})


def make(original: nn.Module, path: str) -> LowRankLinear:
    return LowRankLinear(original, 2, tracker=tracker())


def test_small_layers_stay_and_shared_ones_become_one() -> None:
    """A side below 8 is no place for a slot; one module in two places becomes one new layer in both."""
    net = Net()
    modules = dict(net.named_modules())
    swaps = swap_linears(find_linears({"net": net}, 2), make)
    assert [swap.path for swap in swaps] == ["net.wide", "net.inner.small", "net.inner.again"]
    assert isinstance(net.gate, nn.Linear)
    assert net.wide is net.inner["again"]
    assert isinstance(net.wide, LowRankLinear)
    for swap in swaps:
        swap.undo()
    assert dict(net.named_modules()) == modules


def test_a_failing_swap_puts_everything_back() -> None:
    """When the second layer cannot be made, the first is the original again."""
    net = Net()
    modules = dict(net.named_modules())

    def fails(original: nn.Module, path: str) -> Any:
        if path.endswith("small"):
            raise MemoryError
        return make(original, path)

    with pytest.raises(MemoryError):
        swap_linears(find_linears({"": net}, 2), fails)
    assert dict(net.named_modules()) == modules


def fuse_loss(model: nn.Module) -> None:
    """Give the model a forward as fused losses do: it reads the output layer's weight and never calls the layer."""

    def forward(input_ids: Tensor, labels: Tensor) -> Any:
        hidden = model.base_model(input_ids=input_ids).last_hidden_state[:, :-1]
        logits = hidden @ model.get_output_embeddings().weight.t()
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))

    model.forward = forward


WEIGHTS_READ = {
    "folds": (OwLore(active_layers=1, period=2, rank=4, gap=2, scores="uniform"), False),
    "tied": (OwLore(active_layers=1, period=2, rank=4, gap=2, scores="uniform"), True),
    "adapter": (LoRAFA(rank=4, targets="lm_head"), False),
}


def loss_after_forward(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Return the loss as trainers with a fused one of their own compute it, from hidden states after the forward."""
    hidden = model(input_ids=input_ids, output_hidden_states=True).hidden_states[-1][:, :-1]
    logits = hidden @ model.get_output_embeddings().weight.t()
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("case", WEIGHTS_READ)
def test_a_weight_read_past_the_layer_trains_the_slot(case: str) -> None:
    """A loss that multiplies by `lm_head.weight`, in the forward or after it, trains the head as one that calls it."""
    method, tied = WEIGHTS_READ[case]
    trained = []
    for fused in ("no", "in the forward", "after it"):
        model = llama(tied=tied)
        before = model.lm_head.weight.detach().clone()
        optimizer = attach(model, method, lr=1e-2, keep_logits=True)
        if fused == "in the forward":
            fuse_loss(model)
        for seed in range(4):
            batch = tokens(seed=seed)
            loss = loss_after_forward(model, **batch) if fused == "after it" else model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(optimizer.detach().lm_head.weight.detach())
        assert (trained[-1] - before).abs().max() > 1e-2
    # Sums in another order, which the moments' codes may round apart; a slot left out differs by all of the above.
    for other in trained[1:]:
        torch.testing.assert_close(other, trained[0], rtol=0.0, atol=1e-3)


def test_a_weight_read_outside_a_pass_is_the_parameter() -> None:
    """What saves, ties or inspects a model finds its own parameter: after a step, an evaluation, a failed forward."""
    model = llama(tied=True)
    parameter = model.lm_head.weight
    optimizer = attach(model, OwLore(active_layers=1, rank=4, scores="uniform"))
    with pytest.raises(TypeError, match="must be Tensor"):
        model(input_ids="text")
    assert model.lm_head.weight is parameter is model.model.embed_tokens.weight
    model(**tokens()).loss.backward()
    assert model.lm_head.weight is not parameter
    optimizer.step()
    assert model.lm_head.weight is parameter
    model.eval()(**tokens())
    assert model.lm_head.weight is parameter
