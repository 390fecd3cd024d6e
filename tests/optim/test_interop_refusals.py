"""States that cannot be taken over are refused in one sentence, before anything changes."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.optim import AdamW8bit, from_bitsandbytes, from_torch

from .interop_cases import (
    BITSANDBYTES,
    BNB,
    FORMATS,
    TORCH,
    WRAPPED,
    Format,
    copies,
    equal,
    parameters,
    run,
    snapshot,
    trained,
)


def of_other(build: Callable[..., torch.optim.Optimizer], settings: dict[str, Any]) -> dict[str, Any]:
    params = parameters()
    optimizer = build([{"params": params[:1]}, {"params": params[1:]}], lr=1e-2, **settings)
    run(optimizer, params, range(2))
    return optimizer.state_dict()


def assert_refused(take: Callable[[AdamW8bit, Any], None], state: Any, words: str) -> None:
    ours, params = trained(AdamW8bit)
    before, weights = snapshot(ours), copies(params)
    with pytest.raises(InputError, match=words):
        take(ours, state)
    assert equal(ours.state_dict(), before)
    assert all(map(torch.equal, params, weights))


@pytest.mark.parametrize(
    ("take", "build", "settings", "words"),
    [
        (from_bitsandbytes, BNB.Lion8bit, {}, "other optimizers"),
        (from_bitsandbytes, BNB.Adagrad8bit, {}, "other optimizers"),
        (from_bitsandbytes, BNB.RMSprop8bit, {}, "other optimizers"),
        (from_bitsandbytes, BNB.LAMB8bit, {}, "unorm_vec"),
        (from_bitsandbytes, BNB.AdEMAMix8bit, {}, r"state1 of parameter 0 is .*\[2, 64, 80\]"),
        (from_bitsandbytes, torch.optim.AdamW, {}, "exp_avg.*bitsandbytes"),
        (from_bitsandbytes, AdamW8bit, {}, "m_codes.*bitsandbytes"),
        (from_torch, BNB.AdamW8bit, {}, "not of torch.optim.AdamW"),
        (from_torch, torch.optim.AdamW, {"amsgrad": True}, "amsgrad=True"),
        (from_torch, torch.optim.AdamW, {"maximize": True}, "maximize=True"),
        (from_torch, torch.optim.Adam, {"weight_decay": 0.1}, "couples weight_decay"),
        (from_torch, torch.optim.NAdam, {}, "not of torch.optim.AdamW"),
        (from_torch, torch.optim.RAdam, {}, "not of torch.optim.AdamW"),
        (from_torch, torch.optim.SGD, {}, "not of torch.optim.AdamW"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_states_of_other_optimizers_are_refused(
    take: Callable[[AdamW8bit, Any], None], build: Any, settings: dict[str, Any], words: str
) -> None:
    assert_refused(take, of_other(build, settings), words)


def changed(name: str, change: Callable[[Tensor], Any], number: int = 0) -> Callable[[dict[str, Any]], None]:
    def spoil(state: dict[str, Any]) -> None:
        values = state["state"][number]
        inner = values[WRAPPED] if name in values.get(WRAPPED, {}) else values
        inner[name] = change(inner[name])

    return spoil


def removed(state: dict[str, Any]) -> None:
    del state["state"][3][WRAPPED if WRAPPED in state["state"][3] else "exp_avg_sq"]


def regrouped(state: dict[str, Any]) -> None:
    state["param_groups"][1]["params"].pop()


def homeless(state: dict[str, Any]) -> None:
    state["state"][9] = state["state"].pop(3)


def without_betas(state: dict[str, Any]) -> None:
    del state["param_groups"][1]["betas"]


def percentile(state: dict[str, Any]) -> None:
    state["state"][3][WRAPPED]["gnorm_vec"] = torch.zeros(100)


def without_blocks(state: dict[str, Any]) -> None:
    values = state["state"][3][WRAPPED]
    for which in (1, 2):
        values[f"max{which}"] = values.pop(f"absmax{which}").amax()


def blocks_of_2048(state: dict[str, Any]) -> None:
    values = state["state"][3][WRAPPED]
    for which in (1, 2):
        values[f"absmax{which}"] = values[f"absmax{which}"][::8]


BOTH = [(regrouped, r"groups of \[1, 2\]"), (homeless, "parameter 9"), (without_betas, "betas are None"),
        (removed, "parameter 3 holds"), (changed("step", lambda step: 0.5, 3), "step of parameter 3 is 0.5"),
        (changed("step", lambda step: -1, 3), "step of parameter 3 is -1")]  # fmt: skip
IN_BITSANDBYTES = [
    *BOTH, (percentile, "gnorm_vec"), (without_blocks, "max1"),
    (blocks_of_2048, r"absmax1 of parameter 3 is .*\[3\].*\[17\]"),
    (changed("state2", lambda codes: codes.T), r"state2 of parameter 0 is .*\[80, 64\].*\[64, 80\]"),
    (changed("state2", lambda codes: codes.float()), "state2 of parameter 0 is torch.float32"),
    (changed("state1", lambda m: m[:4], 1), r"state1 of parameter 1 is .*\[4, 7\]"),
    (changed("qmap1", lambda code_map: code_map[:16]), r"qmap1 of parameter 0 is .*\[16\]"),
    (changed("absmax1", lambda absmax: absmax / 0, 3), "parameter 3 holds NaN"),
    (changed("absmax2", lambda absmax: -absmax, 3), "negative second moment"),
    (changed("state1", lambda m: m * math.nan, 2), "parameter 2 holds NaN"),
]  # fmt: skip
IN_TORCH = [
    *BOTH, (changed("exp_avg", lambda m: m[:4], 1), r"exp_avg of parameter 1 is .*\[4, 7\]"),
    (changed("exp_avg_sq", lambda v: v.half(), 3), "torch.float16.*torch.float32 or torch.bfloat16"),
    (changed("exp_avg_sq", lambda v: -v, 3), "negative second moment"),
    (changed("exp_avg", lambda m: None, 3), "exp_avg of parameter 3 is None"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("other", "spoil", "words"),
    [(BITSANDBYTES, *case) for case in IN_BITSANDBYTES] + [(TORCH, *case) for case in IN_TORCH],
    ids=lambda value: re.sub(r"\W+", "-", value).strip("-") if isinstance(value, str) else
    "" if callable(value) else value.build.__module__.partition(".")[0],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(
    other: Format, spoil: Callable[[dict[str, Any]], None], words: str
) -> None:
    """Where the fault is late in the dict, too."""
    theirs, _ = trained(other.build)
    state = copy.deepcopy(theirs.state_dict())
    spoil(state)
    assert_refused(other.take, state, words)


@FORMATS
@pytest.mark.parametrize(
    "state",
    [None, {}, {"state": {}}, {"state": [], "param_groups": []}, {"state": {0: 1}, "param_groups": []}],
    ids=repr,
)
def test_what_is_no_state_dict_is_refused(other: Format, state: Any) -> None:
    assert_refused(other.take, state, "no state dict of")
