"""`GaLoreAdamW8bit` saved, loaded, copied; and what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim.steps import LR, assert_same, saved_and_loaded

from lisa_kernels import GaLoreAdamW8bit
from lisa_kernels.errors import InputError
from lisa_kernels.optim import from_torch, to_bitsandbytes, to_torch

from .galore_cases import group, matrix, mixed, run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_resumed_run_is_bit_equal(stop: int, dtype: torch.dtype) -> None:
    params, groups = mixed(dtype)
    optimizer = GaLoreAdamW8bit(groups, lr=LR, seed=11)
    run(optimizer, params, range(stop))
    state = saved_and_loaded(optimizer.state_dict())
    resumed_params, groups = mixed(dtype)
    for resumed, param in zip(resumed_params, params):
        resumed.data.copy_(param.detach())
    resumed_optimizer = GaLoreAdamW8bit([{**each, "scale": 0.9} if "rank" in each else each for each in groups], lr=1.0)
    resumed_optimizer.load_state_dict(state)
    assert [each.get("scale") for each in resumed_optimizer.param_groups] == [0.25, 0.5, None, 0.25]
    assert_same(resumed_optimizer, optimizer)
    run(optimizer, params, range(stop, stop + 6))
    run(resumed_optimizer, resumed_params, range(stop, stop + 6))
    assert_same(resumed_optimizer, optimizer)


def test_a_lost_schedule_breaks_the_equality() -> None:
    """Negative control: the run above depends on what the state says of the bases."""
    params, groups = mixed()
    optimizer = GaLoreAdamW8bit(groups, lr=LR)
    run(optimizer, params, range(6))
    weights = [param.detach().clone() for param in params]
    states = [copy.deepcopy(optimizer.state_dict()) for _ in range(2)]
    states[1]["projections"][0]["right"]["steps"] += 1
    ends = []
    for each in states:
        for param, weight in zip(params, weights):
            param.data.copy_(weight)
        optimizer.load_state_dict(each)
        run(optimizer, params, range(6, 10))
        ends.append(params[0].detach().clone())
    assert not torch.equal(*ends)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_a_copy_goes_its_own_way(duplicate: Callable[[GaLoreAdamW8bit], GaLoreAdamW8bit]) -> None:
    params, groups = mixed()
    optimizer = GaLoreAdamW8bit(groups, lr=LR)
    run(optimizer, params, range(3))
    twin = duplicate(optimizer)
    twin_params = [param for each in twin.param_groups for param in each["params"]]
    ours = [param for each in optimizer.param_groups for param in each["params"]]
    assert_same(twin, optimizer)
    run(optimizer, ours, range(3, 6))
    assert twin.steps == 3
    run(twin, twin_params, range(3, 6))
    assert_same(twin, optimizer)


def spoiled(state: dict[str, Any], what: str) -> dict[str, Any]:
    state = copy.deepcopy(state)
    first = state["param_groups"][0]
    if what == "rank":
        first["rank"] = 16
    elif what == "type":
        first["proj_type"] = "left"
    elif what == "plain":
        for each in state["param_groups"]:
            each.pop("rank", None)
    elif what == "basis":
        state["state"][0]["right_basis"] = torch.zeros(48, 63)
    elif what == "gap":
        first["update_proj_gap"] = 0
    else:
        del state["projections"][0]
    return state


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rank", "saved with rank=16; this optimizer has 48"),
        ("type", "saved with proj_type='left'"),
        ("plain", "rank"),
        ("basis", "state of parameter 0"),
        ("gap", "update_proj_gap is 0"),
        ("schedule", "bases of the parameters"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(what: str, message: str) -> None:
    params, groups = mixed()
    optimizer = GaLoreAdamW8bit(groups, lr=LR)
    run(optimizer, params, range(3))
    untouched = copy.deepcopy(optimizer)
    with pytest.raises(InputError, match=message):
        optimizer.load_state_dict(spoiled(optimizer.state_dict(), what))
    assert_same(optimizer, untouched)
    assert optimizer.state_dict()["projections"] == untouched.state_dict()["projections"]


def test_other_optimizers_states_are_not_exchanged() -> None:
    weight = matrix(48, 32)
    optimizer = GaLoreAdamW8bit([group(weight)], lr=LR)
    theirs = torch.optim.AdamW([weight])
    run(theirs, [weight], range(1))
    with pytest.raises(InputError):
        from_torch(optimizer, theirs.state_dict())
    assert not optimizer.state
    run(optimizer, [weight], range(1))
    for hand_over in (to_torch, to_bitsandbytes):
        with pytest.raises(InputError, match="of a projected gradient"):
            hand_over(optimizer)


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 33}, "use at most 32"), ({"rank": 0}, "rank is 0"), ({"proj_type": "rihgt"}, "did you mean 'right'")],
    ids=str,
)
def test_a_group_that_cannot_be_projected_is_refused_and_not_kept(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GaLoreAdamW8bit([group(matrix(48, 32), **settings)])
    params, groups = mixed()
    optimizer = GaLoreAdamW8bit(groups, lr=LR)
    with pytest.raises(InputError, match=message):
        optimizer.add_param_group(group(matrix(48, 32), **settings))
    assert len(optimizer.param_groups) == len(groups)
    run(optimizer, params, range(1))


def test_a_vector_in_a_projected_group_is_refused() -> None:
    with pytest.raises(InputError, match="only matrices"):
        GaLoreAdamW8bit([group(matrix(48, 32), matrix(48))])


def test_an_added_group_is_projected() -> None:
    params, groups = mixed()
    optimizer = GaLoreAdamW8bit(groups[:2], lr=LR)
    run(optimizer, params, range(2))
    optimizer.add_param_group({"params": iter([params[2]]), "rank": 8})
    run(optimizer, params, range(2, 4))
    assert optimizer.param_groups[-1]["proj_type"] == "std"
    assert optimizer.moments(params[2])[0].shape == (8, 40)


def test_a_sparse_gradient_is_refused_before_anything_changes() -> None:
    params, groups = mixed()
    optimizer = GaLoreAdamW8bit(groups, lr=LR)
    for param in params:
        param.grad = torch.zeros_like(param)
    params[2].grad = torch.zeros(24, 40).to_sparse()
    with pytest.raises(InputError, match="sparse"):
        optimizer.step()
    assert not optimizer.state
    assert optimizer.steps == 0
