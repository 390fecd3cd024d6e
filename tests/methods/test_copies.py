"""Saved states and copies of attached models, at every moment: what is loaded later is what was trained."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import llama, logits, snapshot, tokens, train
from torch import Tensor

from lisa_kernels import LISA, OWS, BAdam, FullFineTune, GaLore, InputError, LoRAFA, OwLore, attach
from lisa_kernels.methods import Method, SampledAdamW

METHODS: dict[str, Method] = {
    "lisa": LISA(active_layers=1, period=2),
    "ows": OWS(active_layers=1, period=2, scores="uniform"),
    "owlore": OwLore(active_layers=1, period=2, rank=4, gap=2, scores="uniform"),
    "owlore-remainder": OwLore(active_layers=1, period=2, rank=4, gap=2, scores="uniform", master="remainder"),
    "badam": BAdam(period=2),
    "galore": GaLore(rank=4, gap=2),
    "lora-fa": LoRAFA(rank=4),
    "full": FullFineTune(),
}
# Steps before the moment, and whether it has a backward of its own before it.
MOMENTS = {"first": (0, False), "within a period": (1, False), "after a switch": (2, False), "between": (3, True)}


def at(moment: str, method: Method, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, SampledAdamW]:
    """Return an attached model at that moment of its training."""
    model = llama(**changes).to(dtype)
    optimizer = attach(model, method, lr=1e-2)
    steps, backward = MOMENTS[moment]
    for step in range(steps):
        train(model, optimizer, tokens(seed=step))
    if backward:
        model(**tokens(seed=steps)).loss.backward()
    return model, optimizer


def other(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a model of other weights."""
    model = llama(**changes).to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.5)
    return model


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", METHODS)
def test_a_state_is_a_plain_models_and_holds_what_was_trained(name: str, moment: str) -> None:
    model, _ = at(moment, METHODS[name], tied=name == "owlore")
    plain = other(tied=name == "owlore")
    plain.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-6)
    before = llama(tied=name == "owlore")
    assert (moment == "first") == torch.equal(logits(before), logits(plain)), "training has shown"


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", METHODS)
def test_a_copy_is_the_model_of_that_moment_and_of_no_later_one(name: str, moment: str) -> None:
    """deepcopy and a pickle of the whole module; bfloat16 products of the copy are the model's own."""
    model, optimizer = at(moment, METHODS[name], torch.bfloat16, tied=name == "owlore")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    here, copies = logits(model), [copy.deepcopy(model), torch.load(file, weights_only=False)]
    for step in range(3):
        train(model, optimizer, tokens(seed=20 + step))
    assert not torch.equal(logits(model), here)
    for each in copies:
        assert torch.equal(logits(each), here)
        saved = other(torch.bfloat16, tied=name == "owlore")
        saved.load_state_dict(each.state_dict())
        torch.testing.assert_close(logits(saved), here, rtol=0.05, atol=0.05)


def test_a_copys_flags_are_its_owners() -> None:
    """A reference model is frozen once and stays so, without a word; the model that trains goes on."""
    model, optimizer = at("within a period", METHODS["owlore"])
    reference = copy.deepcopy(model).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference(**tokens())
        train(model, optimizer, tokens())
    assert not any(param.requires_grad for param in reference.parameters())


def test_a_copy_says_that_it_cannot_train() -> None:
    model, optimizer = at("within a period", METHODS["owlore"])
    duplicate = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"copy the model after detach\(\)"):
        duplicate(**tokens())
    with pytest.raises(InputError, match=r"copy of an attached one; copy the model after detach\(\)"):
        attach(duplicate, LISA(active_layers=1))
    again = copy.deepcopy(optimizer.detach())
    attach(again, LISA(active_layers=1))


@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_optimizer_is_not_copied_but_its_state(take: Callable[[Any], Any]) -> None:
    _, optimizer = at("first", METHODS["lisa"])
    with pytest.raises(InputError, match=r"save its state_dict\(\)"):
        take(optimizer)


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("name", METHODS)
def test_states_of_both_continue_bit_equal_from_other_weights(name: str, order: str) -> None:
    """Whoever loads them and in whichever order: accelerate, a Trainer, a loop; through weights_only files."""
    model, optimizer = at("between", METHODS[name], torch.bfloat16)
    optimizer.step()
    optimizer.zero_grad()
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    of_model, of_optimizer = torch.load(file, weights_only=True)
    again = other(torch.bfloat16)
    optimizer_again = attach(again, METHODS[name], lr=5.0, seed=7)
    if order == "model first":
        again.load_state_dict(of_model)
    optimizer_again.load_state_dict(of_optimizer)
    if order == "optimizer first":
        again.load_state_dict(of_model)
    for each, its_optimizer in ((model, optimizer), (again, optimizer_again)):
        for step in range(3):
            train(each, its_optimizer, tokens(seed=30 + step))
    assert optimizer.history == optimizer_again.history
    assert_equal(snapshot(model), snapshot(again))


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Assert that two states are equal bit for bit."""
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


# Adapters


def test_an_adapters_saved_weight_is_what_detach_leaves() -> None:
    model, optimizer = at("within a period", METHODS["lora-fa"], torch.bfloat16)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    assert_equal(dict(optimizer.detach().state_dict()), saved)


def test_merged_adapters_are_saved_as_they_are_and_refuse_to_be_loaded_over() -> None:
    model, optimizer = at("within a period", METHODS["lora-fa"])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer.merge()
    assert_equal(dict(model.state_dict()), state)
    with pytest.raises(InputError, match=r"unmerge\(\)"):
        model.load_state_dict(state)
    optimizer.unmerge()
    model.load_state_dict(state)


def test_the_weights_of_an_earlier_step_are_loaded_as_they_are(tmp_path: Any) -> None:
    """As the best checkpoint is at the end: the function is the saved one, and no adapter is added to it twice."""
    model, optimizer = at("within a period", METHODS["lora-fa"])
    best, wanted = {key: value.clone() for key, value in model.state_dict().items()}, logits(model)
    model.load_state_dict(best)
    optimizer.save_adapter(tmp_path / "adapter")
    train(model, optimizer, tokens(seed=40))
    model.load_state_dict(best)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-6)
    assert_equal(dict(model.state_dict()), best)
    with pytest.raises(InputError, match="save the whole model"):
        optimizer.save_adapter(tmp_path / "late")
    train(model, optimizer, tokens(seed=41))
    assert not torch.equal(logits(model), wanted)
