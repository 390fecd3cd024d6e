"""What was frozen before attaching stays frozen under every method, and is told of once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from families import changed, llama, llama_classifier, roberta_classifier, snapshot, tokens, train

from lisa_kernels import LISA, OWS, BAdam, FullFineTune, GaLore, InputError, LoRAFA, OwLore, attach
from lisa_kernels.methods import Method
from lisa_kernels.samplers import AdaptiveSampler

FIRST = "model.layers.0."
PART = "model.layers.1.mlp.up_proj.weight"
METHODS: dict[str, Method] = {
    "lisa": LISA(active_layers=1, period=1),
    "lisa, sampled": LISA(active_layers=1, period=1, embeddings="sampled"),
    "ows": OWS(active_layers=1, period=1, scores=(9.0, 1.0, 1.0)),
    "ows, adaptive": OWS(active_layers=1, period=1, scores="gradient-norm"),
    "owlore": OwLore(active_layers=1, period=1, rank=4, scores="uniform"),
    "owlore, always": OwLore(active_layers=1, period=1, rank=4, scores="uniform", embeddings="always"),
    "badam": BAdam(period=1),
    "galore": GaLore(rank=4),
    "full": FullFineTune(),
}


def frozen_llama() -> Any:
    """Return a Llama whose embedding, first block and one matrix of the second are frozen."""
    model = llama()
    for part in (model.model.embed_tokens, model.model.layers[0], model.get_parameter(PART)):
        part.requires_grad_(False)
    return model


def flags(model: Any) -> dict[str, bool]:
    return {name: param.requires_grad for name, param in model.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_frozen_parameters_stay_and_the_others_train(name: str) -> None:
    """In no group, without state, never drawn; they are counted and named in one warning; detached all is as before."""
    method = METHODS[name]
    model = frozen_llama()
    before, given = snapshot(model), flags(model)
    frozen = {key for key, value in given.items() if not value}
    with pytest.warns(UserWarning, match="frozen") as caught:
        optimizer = attach(model, method, lr=1e-2)
    counted = len(frozen) - (method.get("embeddings", "always") == "frozen")
    (said,) = [str(each.message) for each in caught if "frozen" in str(each.message)]
    assert said.startswith(f"{counted} parameters (first: model.")
    grouped = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert not any(id(param) in grouped for key, param in model.named_parameters() if key in frozen)
    for step in range(6):
        assert 0 not in optimizer.active_layers
        train(model, optimizer, tokens(seed=step))
    assert optimizer.visits[0] == 0
    assert optimizer.layer_names[:1] in ([], ["model.layers.0"])
    assert not changed(model, before) & frozen
    blocks = {key for key in before if key.startswith("model.layers") and key not in frozen}
    assert blocks <= changed(model, before) or isinstance(optimizer.sampler, AdaptiveSampler)
    optimizer.detach()
    assert flags(model) == given
    assert not changed(model, before) & frozen


def test_what_the_method_leaves_alone_anyway_is_not_told_of() -> None:
    """Frozen embeddings under BAdam, base weights under LoRA-FA: nothing that would have trained."""
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, BAdam()).detach()
        attach(llama().requires_grad_(False), LoRAFA(rank=4)).detach()


def test_adapters_train_beside_frozen_weights() -> None:
    """Users of LoRA freeze all first: every linear layer gets its adapter nevertheless."""
    model = llama().requires_grad_(False)
    before = snapshot(model)
    optimizer = attach(model, LoRAFA(rank=4), lr=1e-2)
    losses = [train(model, optimizer, tokens()) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert not changed(model, before)
    optimizer.detach()
    assert not any(flags(model).values())
    assert len(changed(model, before)) == 21


@pytest.mark.parametrize("make", [llama_classifier, roberta_classifier], ids=lambda make: make.__name__)
def test_a_frozen_new_head_stays(make: Any) -> None:
    """A classifier that its user froze does not train beside the adapters."""
    model = make()
    head = [child for name, child in model.named_children() if name != model.base_model_prefix]
    for part in head:
        part.requires_grad_(False)
    before = [param.detach().clone() for part in head for param in part.parameters()]
    with pytest.warns(UserWarning, match="frozen"):
        optimizer = attach(model, LoRAFA(rank=4), lr=1e-2)
    train(model, optimizer, {"input_ids": tokens()["input_ids"], "labels": torch.tensor([0, 1])})
    assert all(map(torch.equal, before, [param.detach() for part in head for param in part.parameters()]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_low_rank_embeddings_leave_the_frozen_one(tied: bool, part: str) -> None:
    """The other trains through its slot; a head tied to a frozen embedding is frozen with it."""
    model = llama(tied=tied)
    frozen = "lm_head.weight" if part == "lm_head" and not tied else "model.embed_tokens.weight"
    (model.lm_head if part == "lm_head" else model.model.embed_tokens).requires_grad_(False)
    before = snapshot(model)
    with pytest.warns(UserWarning, match=rf"1 parameters \(first: {frozen}\)"):
        optimizer = attach(model, OwLore(active_layers=1, rank=4, scores="uniform"), lr=1e-2)
    for step in range(3):
        train(model, optimizer, tokens(seed=step))
    outer = {"model.embed_tokens.weight", "lm_head.weight"} & before.keys()
    assert changed(model, before) & outer == outer - {frozen}
    optimizer.detach()


def test_a_model_that_is_frozen_throughout_is_refused() -> None:
    """Nothing would train; the sentence says what to call."""
    for method in (FullFineTune(), GaLore(rank=4), BAdam(), LISA(), OwLore(active_layers=1, rank=4, scores="uniform")):
        with pytest.raises(InputError, match=r"all \d+ parameters .* are frozen.*requires_grad_\(True\)"):
            attach(llama().requires_grad_(False), method)


def test_more_layers_than_can_be_drawn_are_refused() -> None:
    with pytest.raises(InputError, match=r"active_layers is 3, but 1 of .* 3 layers are frozen whole.*at most 2"):
        attach(frozen_llama(), LISA(active_layers=3))


@pytest.mark.filterwarnings("ignore:.*frozen before")
def test_a_run_with_frozen_layers_goes_on_from_its_state() -> None:
    """The saved draw counts the layers that can be drawn; another set of them is refused."""
    method = METHODS["lisa"]
    losses = []
    for stop in (False, True):
        model = frozen_llama()
        optimizer = attach(model, method, lr=1e-2)
        for step in range(4):
            if stop and step == 2:
                state, weights = optimizer.state_dict(), {n: p.detach().clone() for n, p in model.named_parameters()}
                model = frozen_llama()
                model.load_state_dict(weights)
                optimizer = attach(model, method, lr=1e-2)
                optimizer.load_state_dict(state)
            loss = train(model, optimizer, tokens(seed=step))
        losses.append(loss)
    assert losses[0] == losses[1]
    other = frozen_llama()
    other.model.layers[1].requires_grad_(False)
    with pytest.raises(InputError, match="draws from 2 layers; of this model's 1 can be drawn"):
        attach(other, method).load_state_dict(optimizer.state_dict())


def test_what_is_unfrozen_later_is_frozen_again() -> None:
    """Attached, a parameter of the user's stays as it was when attaching; that is said."""
    model = llama()
    model.model.layers[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="frozen before"):
        optimizer = attach(model, FullFineTune(), lr=1e-2)
    before = snapshot(model)
    model.requires_grad_(True)
    with pytest.warns(UserWarning, match="changed outside"):
        train(model, optimizer, tokens())
    assert not any(name.startswith(FIRST) for name in changed(model, before))
