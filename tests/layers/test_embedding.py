"""An embedding that carries a slot is the model's own embedding, and gives the slot its table's projected gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lisa_kernels.basis import BasisTracker
from lisa_kernels.errors import InputError
from lisa_kernels.layers import LowRankEmbedding, LowRankLinear, TappedEmbedding, lookup_factor, tap_embedding
from lisa_kernels.layers.embedding import OrderedLookup

VOCABULARY, N, RANK = 61, 24, 4


class Scaled(nn.Embedding):
    """As in models that multiply what they look up."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.5


class Shifted(nn.Embedding):
    """Not linear in its rows alone."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1.0


def ids() -> Tensor:
    return torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def made(cls: type[nn.Embedding] = nn.Embedding, dtype: torch.dtype = torch.float32) -> nn.Embedding:
    torch.manual_seed(0)
    return cls(VOCABULARY, N, padding_idx=2).to(dtype)


def tapped(embedding: nn.Embedding) -> tuple[TappedEmbedding, LowRankEmbedding]:
    layer = LowRankEmbedding(embedding, RANK, BasisTracker(rank=RANK, gap=2, offset=0, seed=0, stream=1))
    tap = tap_embedding("embed", embedding, layer)
    embedding.weight.requires_grad_(False)
    layer.activate()
    layer.slot.requires_grad_(True)
    layer.arm()
    return tap, layer


@pytest.mark.parametrize("cls", [nn.Embedding, Scaled])
@pytest.mark.parametrize("steps", [1, 2], ids=["the step that finds the basis", "a later step"])
def test_the_output_is_the_plain_one_and_the_gradient_projected(cls: type[nn.Embedding], steps: int) -> None:
    """Bit-equal rows, and dB = P Gᵀ for the table's gradient, a model's own scale included."""
    embedding, plain = made(cls), made(cls)
    _, layer = tapped(embedding)
    for step in range(steps):
        layer.slot.grad, plain.weight.grad = None, None
        dy = torch.randn(2, 9, N, generator=torch.Generator().manual_seed(step))
        y = embedding(ids())
        assert torch.equal(y, plain(ids()))
        y.backward(dy)
        plain(ids()).backward(dy)
        assert plain.weight.grad is not None
        assert layer.slot.grad is not None
        torch.testing.assert_close(layer.slot.grad, layer.basis @ plain.weight.grad.t(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(layer.basis @ layer.basis.t(), torch.eye(RANK), rtol=0, atol=1e-5)
        assert layer.tracker is not None
        layer.tracker.due = False
        layer.arm()


def test_few_distinct_tokens_make_a_whole_basis() -> None:
    """A batch of one id has a gradient of rank one: the basis has all its rows all the same, that direction in it."""
    embedding = made()
    _, layer = tapped(embedding)
    dy = torch.randn(1, 3, N)
    embedding(torch.full((1, 3), 5)).backward(dy)
    torch.testing.assert_close(layer.basis @ layer.basis.t(), torch.eye(RANK), rtol=0, atol=1e-4)
    gradient = dy.sum((0, 1))
    torch.testing.assert_close(layer.basis.t() @ (layer.basis @ gradient), gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("state", ["inactive", "no grad"])
def test_outside_training_nothing_is_in_the_graph(state: str) -> None:
    """An inactive slot, or a forward without gradients, leaves the lookup as torch made it."""
    embedding = made()
    _, layer = tapped(embedding)
    if state == "inactive":
        layer.deactivate()
    with torch.set_grad_enabled(state == "inactive"):
        y = embedding(ids())
    assert not y.requires_grad


def test_state_dicts_are_the_plain_ones() -> None:
    """Neither slot nor basis is saved or wanted when loading strictly."""
    embedding, plain = made(), made()
    tapped(embedding)
    assert list(embedding.state_dict()) == list(plain.state_dict()) == ["weight"]
    embedding.load_state_dict(plain.state_dict())
    assert {name for name, _ in embedding.named_parameters()} == {"weight", "low_rank.slot"}


def test_undo_leaves_a_plain_embedding() -> None:
    """No child, no hook, the same table."""
    embedding = made()
    weight = embedding.weight
    tap, layer = tapped(embedding)
    layer.deactivate()
    tap.undo()
    assert not list(embedding.children())
    assert not embedding._forward_hooks
    assert embedding.weight is weight
    assert not embedding(ids()).requires_grad


def test_a_copy_trains_a_slot_of_its_own() -> None:
    """A deep copy's hook leads into the copy's slot, whose table is the copy's."""
    embedding = made()
    _, layer = tapped(embedding)
    twin = copy.deepcopy(embedding)
    twin(ids()).sum().backward()
    assert layer.slot.grad is None
    other = twin.get_submodule("low_rank")
    assert isinstance(other, LowRankEmbedding)
    assert other.slot.grad is not None
    assert other.weight is twin.weight


def test_tied_to_an_output_layer_both_uses_add_up() -> None:
    """One slot holds P (G of the lookup + G of the output layer)ᵀ, in the basis that the output layer found."""

    class Tied(nn.Module):
        def __init__(self, low_rank: bool) -> None:
            super().__init__()
            self.embed = made()
            head: nn.Module = nn.Linear(N, VOCABULARY, bias=False)
            head.weight = self.embed.weight
            if low_rank:
                tracker = BasisTracker(rank=RANK, gap=0, offset=0, seed=0, stream=1)
                head = self.layer = LowRankLinear(head, RANK, tracker=tracker)
                tap_embedding("embed", self.embed, self.layer)
                self.embed.weight.requires_grad_(False)
                self.layer.activate()
                self.layer.slot.requires_grad_(True)
                self.layer.arm()
            self.head = head

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens).tanh()).logsumexp(-1).sum()

    plain, model = Tied(False), Tied(True)
    for each in (plain, model):
        each(ids()).backward()
    assert plain.embed.weight.grad is not None
    assert model.layer.slot.grad is not None
    wanted = model.layer.basis @ plain.embed.weight.grad.t()
    torch.testing.assert_close(model.layer.slot.grad, wanted, rtol=1e-4, atol=1e-5)
    assert not list(model.embed.children())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_factor_of_a_model_is_found(dtype: torch.dtype) -> None:
    """1 for torch's own, the scale for a class that has one, to rounding."""
    assert lookup_factor(made(dtype=dtype)) == 1.0
    assert lookup_factor(made(Scaled, dtype)) == pytest.approx(3.5, rel=1e-2)


@pytest.mark.parametrize(
    ("embedding", "words"),
    [
        (made(Shifted), "Shifted returns more than its rows"),
        (nn.Embedding(8, 8, max_norm=1.0), "max_norm"),
        (nn.Embedding(8, 8, scale_grad_by_freq=True), "scale_grad_by_freq"),
    ],
    ids=["not linear", "max_norm", "scale_grad_by_freq"],
)
def test_what_cannot_carry_a_slot_is_refused(embedding: nn.Embedding, words: str) -> None:
    """The message says what to choose instead."""
    with pytest.raises(InputError, match=words):
        lookup_factor(embedding)


@pytest.mark.parametrize("cls", [nn.Embedding, Scaled])
def test_a_table_that_trains_has_torchs_gradient_in_one_order(cls: type[nn.Embedding]) -> None:
    """And rows as they were; one that is frozen stays out of the graph, also where its rows are asked to be in one."""
    ordered, plain = made(cls), made(cls)
    ordered.register_forward_hook(OrderedLookup(ordered), with_kwargs=True)
    dy = torch.randn(2, 9, N, generator=torch.Generator().manual_seed(1))
    y = ordered(input=ids())
    assert torch.equal(y, plain(ids()))
    y.backward(dy)
    plain(ids()).backward(dy)
    torch.testing.assert_close(ordered.weight.grad, plain.weight.grad)
    frozen = made(cls).requires_grad_(False)
    frozen.register_forward_hook(lambda module, args, y: y.requires_grad_())
    frozen.register_forward_hook(OrderedLookup(frozen), with_kwargs=True)
    assert frozen(ids()).requires_grad
