"""`AdamW8bit` saved, loaded, copied: nothing is lost, and what does not fit changes nothing."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.optim import AdamW8bit

from .steps import LR, assert_same, parameters, run, saved_and_loaded, set_gradients, tensors_of


def test_a_resumed_run_is_bit_equal() -> None:
    params = parameters(torch.bfloat16)
    optimizer = AdamW8bit(params, lr=LR, seed=11)
    run(optimizer, params, range(3))
    set_gradients(params, 3, scale=math.nan)
    optimizer.step()
    state = saved_and_loaded(optimizer.state_dict())
    resumed_params = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = AdamW8bit(resumed_params, lr=1.0)
    resumed.load_state_dict(state)
    assert_same(resumed, optimizer)
    run(optimizer, params, range(4, 8))
    run(resumed, resumed_params, range(4, 8))
    assert_same(resumed, optimizer)
    assert resumed.param_groups[0]["lr"] == LR
    assert (resumed.steps, resumed.skipped_steps) == (7, 1)


def test_a_resume_that_forgot_the_step_count_would_differ() -> None:
    """Negative control of the bit-equality above."""
    params = parameters(torch.bfloat16)
    optimizer = AdamW8bit(params, lr=LR)
    run(optimizer, params, range(3))
    state = {**optimizer.state_dict(), "counters": {}}
    resumed_params = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = AdamW8bit(resumed_params, lr=LR)
    resumed.load_state_dict(copy.deepcopy(state))
    run(optimizer, params, range(3, 4))
    run(resumed, resumed_params, range(3, 4))
    assert not torch.equal(resumed_params[0], params[0])


def test_codes_and_scales_keep_their_dtypes_through_a_load() -> None:
    """torch's own loader casts them to the parameter's dtype."""
    params = parameters(torch.bfloat16)
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(1))
    other = AdamW8bit(parameters(torch.bfloat16))
    other.load_state_dict(optimizer.state_dict())
    state = other.state[other.param_groups[0]["params"][0]]
    assert state["m_codes"].dtype == state["v_codes"].dtype == torch.uint8
    assert state["m_absmax"].dtype == torch.float32
    assert state["step"].dtype == torch.int64


def test_a_loaded_state_is_a_copy() -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(1))
    other_params = parameters()
    other = AdamW8bit(other_params)
    other.load_state_dict(optimizer.state_dict())
    before = [tensor.clone() for tensor in tensors_of(optimizer)]
    run(other, other_params, range(1, 3))
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors_of(optimizer), before))
    assert optimizer.steps == 1


def test_loading_into_a_used_optimizer_forgets_what_it_held() -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    fresh = copy.deepcopy(optimizer.state_dict())
    run(optimizer, params, range(2))
    optimizer.load_state_dict(fresh)
    assert not optimizer.state
    assert optimizer.steps == 0


def grouped(split: int, **settings: Any) -> AdamW8bit:
    params = parameters()
    optimizer = AdamW8bit([{"params": params[:split]}, {"params": params[split:]}], **settings)
    run(optimizer, params, range(2))
    return optimizer


def reshaped(state: dict[str, Any]) -> None:
    state["state"][0]["m_absmax"] = torch.zeros(7)


def recast(state: dict[str, Any]) -> None:
    state["state"][0]["v_codes"] = state["state"][0]["v_codes"].float()


def of_torch(state: dict[str, Any]) -> None:
    state["state"][0] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(64, 80), "exp_avg_sq": torch.zeros(64, 80)}


def without_betas(state: dict[str, Any]) -> None:
    del state["param_groups"][1]["betas"]


def homeless(state: dict[str, Any]) -> None:
    state["state"][9] = state["state"].pop(0)


def regrouped(state: dict[str, Any]) -> None:
    state.update(grouped(2).state_dict())


def reblocked(state: dict[str, Any]) -> None:
    state.update(grouped(1, block_size=64).state_dict())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (reshaped, "parameter 0 is"), (recast, "parameter 0 is"), (of_torch, "exp_avg"),
        (without_betas, "betas are None"),
        (homeless, "parameter 9"), (regrouped, r"\[2, 1\].*\[1, 2\]"), (reblocked, "block_size=64.*256"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(
    spoil: Callable[[dict[str, Any]], None], words: str
) -> None:
    state = copy.deepcopy(grouped(1, lr=0.5).state_dict())
    spoil(state)
    optimizer = grouped(1)
    before = [tensor.clone() for tensor in tensors_of(optimizer)]
    with pytest.raises(InputError, match=words):
        optimizer.load_state_dict(state)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors_of(optimizer), before))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]
    assert optimizer.steps == 2


def test_a_state_with_keys_as_strings_and_lists_for_tuples_is_taken() -> None:
    """What JSON makes of a state dict."""
    optimizer = grouped(1)
    state = optimizer.state_dict()
    state["state"] = {str(number): values for number, values in state["state"].items()}
    for group in state["param_groups"]:
        group["betas"] = list(group["betas"])
    other = grouped(1)
    other.load_state_dict(state)
    params = [[p for group in one.param_groups for p in group["params"]] for one in (optimizer, other)]
    for one, its_params in zip((optimizer, other), params):
        run(one, its_params, range(2, 4))
    assert_same(optimizer, other)


def test_load_hooks_see_the_state_before_and_the_result_after() -> None:
    optimizer, other = grouped(1), grouped(1, lr=0.5)
    seen: list[Any] = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(len(state["state"])))
    optimizer.register_load_state_dict_post_hook(
        lambda given: seen.append(int(next(iter(given.state.values()))["step"]))
    )
    run(other, [p for group in other.param_groups for p in group["params"]], range(2, 5))
    for _ in range(2):
        optimizer.load_state_dict(other.state_dict())
    assert seen == [3, 5, 3, 5]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"]
)
def test_a_copy_is_whole_and_its_own(duplicate: Callable[[Any], Any]) -> None:
    params = parameters(torch.bfloat16)
    optimizer = AdamW8bit(params, lr=LR, block_size=64, seed=7)
    run(optimizer, params, range(2))
    twin = duplicate(optimizer)
    twin_params = [param for group in twin.param_groups for param in group["params"]]
    assert_same(twin, optimizer)
    run(optimizer, params, range(2, 4))
    assert twin.steps == 2
    run(twin, twin_params, range(2, 4))
    assert_same(twin, optimizer)
    assert [twin.index_of(param) for param in twin_params] == [0, 1, 2]
