"""Weights of resting groups in a store: true wherever they are read, and no bytes on the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from methods.test_resume import assert_same
from torch import nn

from lisa_kernels import InputError, TimestepExperts, attach

from .small_flow import add_gradients, examples, small_flow, start, train

PAGED = TimestepExperts(groups=3, resting_weights="page")


def held_blocks(model: nn.Module) -> list[int]:
    """Return the blocks whose weights have bytes of their own."""
    blocks = list(model.get_submodule("blocks").children())
    return [n for n, block in enumerate(blocks) if block.up.weight.untyped_storage().nbytes() > 100]  # type: ignore[operator, union-attr]


def test_only_the_active_groups_weights_are_on_the_device() -> None:
    """From the start on, after each switch; and all of them, each with a storage of its own, after detaching."""
    model, optimizer = start(PAGED)
    for step in range(4):
        assert held_blocks(model) == list(optimizer.route.blocks_of(step % 3))
        train(model, optimizer, step, step + 1)
    optimizer.detach()
    params = list(model.parameters())
    assert len({param.untyped_storage().data_ptr() for param in params}) == len(params)
    assert all(param.untyped_storage().nbytes() == param.nbytes for param in params)


def test_the_state_of_the_model_has_the_true_weights() -> None:
    """Of resting groups too, though their parameters are NaN, so that who reads them sees it."""
    model, _ = start(PAGED)
    assert model.blocks[5].up.weight.isnan().all()  # type: ignore[union-attr]
    assert_same(dict(model.state_dict()), dict(small_flow().state_dict()))


def test_loading_a_model_writes_weights_that_rest() -> None:
    """And leaves them at rest; one block's own state too."""
    model, optimizer = start(PAGED)
    other = small_flow(seed=9)
    model.load_state_dict(other.state_dict())
    model.blocks[4].load_state_dict(other.blocks[1].state_dict())
    other.blocks[4].load_state_dict(other.blocks[1].state_dict())
    assert held_blocks(model) == [0, 1]
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    optimizer.detach()
    assert_same(dict(model.state_dict()), dict(other.state_dict()))


def test_an_evaluation_has_the_weights_of_its_time() -> None:
    """One visiting group beside the one that trains; the next training forward sends it home."""
    model, optimizer = start(PAGED)
    plain, _ = start(TimestepExperts(groups=3))
    noise, _, label = examples(0)
    for t, held in ((0.9, [0, 1, 4, 5]), (0.5, [0, 1, 2, 3]), (0.1, [0, 1])):
        times = torch.full((4,), t)
        model.eval()
        plain.eval()
        assert torch.equal(model(noise, times, label), plain(noise, times, label))
        assert held_blocks(model) == held
    model(noise, torch.full((4,), 0.9), label)
    model.train()
    train(model, optimizer, 0, 1)
    assert held_blocks(model) == [2, 3]


def test_a_copy_of_the_model_is_refused_while_weights_rest() -> None:
    """Its weights would be the stand-ins."""
    model, optimizer = start(PAGED)
    with pytest.raises(InputError, match="weights of resting groups are in the store"):
        copy.deepcopy(model)
    optimizer.detach()
    assert_same(dict(copy.deepcopy(model).state_dict()), dict(model.state_dict()))


def test_a_page_that_cannot_be_written_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step was taken, its weights can be saved, and the next forward stops too: stand-ins never run."""
    model, optimizer = start(PAGED)
    kept, other = start(TimestepExperts(groups=3))
    train(model, optimizer, 0, 1)
    train(kept, other, 0, 2)

    def full(*_: Any) -> None:
        raise InputError("no room")

    monkeypatch.setattr(optimizer._weights._shelf, "put", full)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="no room"):
        train(model, optimizer, 1, 2)
    assert_same(dict(model.state_dict()), dict(kept.state_dict()))
    with pytest.raises(InputError, match="no room"):
        train(model, optimizer, 2, 3)
    monkeypatch.undo()
    assert add_gradients(model, optimizer, 2).isfinite()


def test_weights_cannot_rest_where_everything_stays() -> None:
    """The model is as it was."""
    model = small_flow()
    with pytest.raises(InputError, match='paging="resident" keeps everything there'):
        attach(model, PAGED, paging="resident")
    assert type(model.blocks) is nn.ModuleList


def test_an_attachment_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that were away already come back, hooks go, the list is plain."""
    model = small_flow()
    before = copy.deepcopy(dict(model.state_dict()))

    def fail(_: Any) -> None:
        raise InputError("no")

    monkeypatch.setattr("lisa_kernels.flow.experts_adamw.ExpertsAdamW._begin_period", fail)
    with pytest.raises(InputError, match="no"):
        attach(model, PAGED)
    assert_same(dict(model.state_dict()), before)
    assert type(model.blocks) is nn.ModuleList
    assert not any(module._state_dict_hooks or module._forward_pre_hooks for module in model.modules())
    monkeypatch.undo()
    assert attach(model, PAGED) is not None
