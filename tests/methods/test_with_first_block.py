"""A token embedding that trains while the first block is drawn: what moves when, how deep backwards go, what rests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import DECODERS, anatomy, changed, llama, logits, snapshot, tokens, train
from torch import Tensor, nn

from lisa_kernels import LISA, OWS, BAdam, InputError, OwLore, attach
from lisa_kernels.methods import Method

from .test_truncation import Counter, checkpointing, plain

RANK = 4
WITH_FIRST: dict[str, Any] = {"embeddings": "with-first-block", "rank": RANK}
SHALLOW = OwLore(active_layers=1, period=2, gap=2, scores="uniform", design="shallow", **WITH_FIRST)
METHODS: dict[str, Method] = {
    "owlore": OwLore(active_layers=1, period=2, gap=2, scores="uniform", **WITH_FIRST),
    "shallow": SHALLOW,
    "lisa": LISA(active_layers=1, period=2, **WITH_FIRST),
    "badam": BAdam(period=2, **WITH_FIRST),
    "paged": OwLore(active_layers=1, period=2, gap=2, scores="uniform", retired_state="page", **WITH_FIRST),
}


def scores_of(layer: int, layers: int = 3) -> tuple[float, ...]:
    """Return scores by which one layer is drawn as good as always."""
    return tuple(1.0 if index == layer else 1e-9 for index in range(layers))


def fixed(layer: int, **changes: Any) -> OwLore:
    """Return a method that draws one layer."""
    return OwLore(**{"active_layers": 1, "period": 50, "gap": 0, "scores": scores_of(layer), **WITH_FIRST, **changes})


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", name) for name in METHODS]
    + [(name, "owlore") for name in ("llama-tied", "gpt2", "opt")],
)  # fmt: skip
def test_the_embedding_moves_in_the_periods_of_the_first_block(name: str, method: str) -> None:
    """So do position tables; blocks move when they are drawn, head and final norm, and a table tied to it, always."""
    family = DECODERS[name]
    model = family.make()
    shape, unchanged = anatomy(model), logits(model)
    optimizer = attach(model, METHODS[method], lr=5e-3)
    assert torch.equal(logits(model), unchanged)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    seen = set()
    for seed in range(8):
        first = 0 in optimizer.active_layers
        blocks = tuple(f"{family.path}.{index}." for index in optimizer.active_layers)
        wanted = {*family.head} | {key for key in snapshot(model) if key.startswith(blocks)}
        wanted |= {*family.embeddings} if first else {*family.embeddings[: int(tied)]}
        before = snapshot(model)
        train(model, optimizer, tokens(seed=seed))
        assert changed(model, before) == wanted
        seen.add(first)
    assert seen == {True, False}
    trained = logits(model)
    optimizer.detach()
    assert anatomy(model) == shape
    assert torch.equal(logits(model), trained)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("enable", [plain, checkpointing], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_backward_ends_at_the_lowest_active_layer(name: str, enable: Callable[[Any], None]) -> None:
    """Blocks below it run no backward and are not recomputed; where it is the first, all do."""
    model = DECODERS[name].make()
    optimizer = attach(model, SHALLOW)
    enable(model)
    lowest = set()
    for seed in range(8):
        counter = Counter(model)
        lowest.add(optimizer.active_layers[0])
        above = [index >= optimizer.active_layers[0] for index in range(3)]
        model(**tokens(seed=seed)).loss.backward()
        assert counter.backwards == [int(inside) for inside in above]
        assert counter.runs == [1 + int(inside and enable is checkpointing) for inside in above]
        optimizer.step()
        optimizer.zero_grad()
    assert 0 in lowest
    assert len(lowest) > 1


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_low_rank_embeddings_take_every_backward_to_the_bottom() -> None:
    """Negative control: the same draw with an embedding that trains always."""
    model = llama()
    attach(model, fixed(2, embeddings="low-rank"))
    counter = Counter(model)
    model(**tokens()).loss.backward()
    assert counter.backwards == [1, 1, 1]


def uses_of_the_table(plain_model: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients of a tied table's lookup and of its output layer, each by itself."""
    table = plain_model.get_input_embeddings().weight
    head = nn.Parameter(table.detach().clone())
    plain_model.lm_head.weight = head
    plain_model(**tokens()).loss.backward()
    assert table.grad is not None
    assert head.grad is not None
    return table.grad, head.grad


@pytest.mark.parametrize("layer", [0, 1])
def test_a_tied_slot_leaves_the_lookup_out_while_the_first_block_rests(layer: int) -> None:
    """dB = P Gᵀ, G of the output layer alone, or of both uses where the first block is drawn; so it is for bases."""
    model = llama(tied=True)
    optimizer = attach(model, fixed(layer), lr=0.0)
    ((_, slot_layer),) = optimizer.layout.always.lowrank.items()
    lookup, head = uses_of_the_table(copy.deepcopy(llama(tied=True)))
    for _ in range(2):  # with a basis to be found, and with one
        model(**tokens()).loss.backward()
        wanted = slot_layer.basis @ (head + lookup if layer == 0 else head).t()
        torch.testing.assert_close(slot_layer.slot.grad, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        optimizer.step()
        optimizer.zero_grad()
    assert float(lookup.norm()) > 0.1 * float(head.norm())


@pytest.mark.parametrize(("kept", "owns"), [("drop", False), ("keep", True)])
def test_a_resting_embedding_owns_what_its_block_does(kept: str, owns: bool) -> None:
    """No slot; moments and basis only where those of layers that left are kept."""
    model = llama()
    optimizer = attach(model, OwLore(active_layers=1, period=1, scores="uniform", retired_state=kept, **WITH_FIRST))
    assert optimizer.layout.with_first is not None
    (layer,) = optimizer.layout.with_first.lowrank.values()
    for seed in range(8):
        train(model, optimizer, tokens(seed=seed))
        active = 0 in optimizer.active_layers
        assert layer.active is active
        if not active and optimizer.visits[0]:
            assert (layer.basis.numel() > 0) is owns
            assert bool(optimizer.state.get(layer.slot)) is owns
    assert optimizer.visits[0]


def test_gradient_norms_are_those_of_the_block() -> None:
    """A score that adapts is of the first block, and not of the embedding that trains with it."""
    model = llama()
    optimizer = attach(model, OWS(active_layers=3, period=50, scores="gradient-norm", **WITH_FIRST), lr=0.0)
    model(**tokens()).loss.backward()
    squares = sum(
        float(param.grad.pow(2).sum()) for param in model.model.layers[0].parameters() if param.grad is not None
    )
    optimizer.step()
    total, count = optimizer._norms[0].tolist()
    assert count == 1
    assert total == pytest.approx(squares**0.5, rel=1e-4)


def test_a_first_block_that_is_frozen_whole_is_refused() -> None:
    """The embedding would never train, without a word; where that is frozen as well nothing is lost."""
    model = llama()
    model.model.layers[0].requires_grad_(False)
    shape = anatomy(model)
    with pytest.raises(InputError, match=r"model\.layers\.0 is frozen whole"):
        attach(model, SHALLOW)
    assert anatomy(model) == shape
    model.model.embed_tokens.requires_grad_(False)
    with pytest.warns(UserWarning, match="frozen before attaching"):
        optimizer = attach(model, SHALLOW, lr=5e-3)
    before = snapshot(model)
    for seed in range(6):
        train(model, optimizer, tokens(seed=seed))
    moved = changed(model, before)
    assert "lm_head.weight" in moved
    assert "model.embed_tokens.weight" not in moved
