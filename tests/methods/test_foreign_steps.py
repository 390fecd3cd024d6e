"""Steps of an attached model by an optimizer that is not its own are refused, and no others."""

from __future__ import annotations

import gc

import pytest
import torch
from families import changed, llama, snapshot, tokens, train

from lisa_kernels import LISA, OwLore, attach
from lisa_kernels.errors import InputError

METHODS = [LISA(active_layers=1, period=2), OwLore(active_layers=1, period=2, rank=4, scores="uniform")]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("older", [False, True], ids=["made after", "made before"])
def test_another_optimizer_may_not_step_an_attached_model(method: object, older: bool) -> None:
    """One made by a trainer for what is trainable now, or one from before: refused before a weight moves."""
    model = llama()
    before = torch.optim.AdamW(model.parameters())
    optimizer = attach(model, method)
    other = before if older else torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**tokens()).loss.backward()
    weights = snapshot(model)
    with pytest.raises(InputError, match=r"AdamW is about to step .* optimizers=\(optimizer, None\)"):
        other.step()
    assert not changed(model, weights)
    optimizer.step()
    assert changed(model, weights)


def test_other_models_and_detached_ones_are_left_alone() -> None:
    model, other = llama(), llama()
    optimizer = attach(model, METHODS[0])
    train(other, torch.optim.SGD(other.parameters(), lr=0.1), tokens())
    train(model, optimizer, tokens())
    optimizer.detach()
    before = snapshot(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), tokens())
    assert changed(model, before)


def test_a_forgotten_optimizer_is_forgotten() -> None:
    """The hook does not keep an optimizer alive, and goes with it."""
    from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

    before = set(hooks)
    optimizer = attach(llama(), METHODS[0])
    assert len(set(hooks) - before) == 1
    del optimizer
    gc.collect()
    assert not set(hooks) - before


def test_a_step_on_other_parameters_than_those_attached_is_refused() -> None:
    """As DeepSpeed does, which puts flat copies into the groups of the optimizer that it is given."""
    model = llama()
    optimizer = attach(model, METHODS[0])
    model(**tokens()).loss.backward()
    group = optimizer.param_groups[0]
    group["params"] = [torch.nn.Parameter(torch.cat([param.detach().flatten() for param in group["params"]]))]
    with pytest.raises(InputError, match=r"'matrices' of the optimizer are others.*DeepSpeed"):
        optimizer.step()
