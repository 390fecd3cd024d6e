"""Real optimizers of other libraries, runs of them, and what two runs may differ by."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import bitsandbytes
import pytest
import torch
from tolerances import ADAMW_UPDATE, ADAMW_WEIGHT, BFLOAT16_ROUNDING
from torch import Tensor, nn

from lisa_kernels.optim import AdamW8bit, from_bitsandbytes, from_torch, to_bitsandbytes, to_torch

# Its names are not exported to type checkers.
BNB: Any = bitsandbytes.optim
STEPS = 20
WRAPPED = "__bnb_optimizer_quant_state__"

# A comparison is the norm of the difference of two runs' weights, relative to the norm of what one of them moved. The
# gradients do not depend on the weights, so runs differ by rounding only.
# Two float32 runs round apart by both errors once each step; a weight is at most 8 times as large as what it moves.
FLOAT32_RUNS = 2 * STEPS * 2 * (8 * ADAMW_WEIGHT + ADAMW_UPDATE)
# bfloat16 weights, at most 4 times as large as what they move, take a random walk: in each of two runs and two halves
# a step errs by 1/√6 = 0.41 of a unit (stochastic; nearest 1/√12), and a unit is two half units.
BFLOAT16_WEIGHTS = math.sqrt(2 * 2 * STEPS) * 0.41 * 2 * BFLOAT16_ROUNDING * 4
# torch keeps bfloat16 moments of bfloat16 weights: nearest rounding of the second moment errs by half a unit a step,
# at worst all in one direction and counting half in its root; of the first moment it lives for 1 / (1 − β₁) = 10 steps.
BFLOAT16_MOMENTS = (2 * STEPS / 2 + 10) * BFLOAT16_ROUNDING
# Our stochastic rounding errs by δ/√6 for a step δ of 1/8 to 1/16, on average 0.09, that is 0.037 of a moment. It
# gathers as √(1 / (1 − β₁²)) = 2.3 in m and as √20 in v, which counts half: together 0.12 of one update; the errors of
# 20 updates are not all of one sign. bitsandbytes' map is finer near the absmax, where these gradients keep it.
EIGHT_BIT_RUNS = 0.12
# One conversion: half a step of ours; a first moment below the smallest code errs by that code at most, relative to the
# block's absmax; and a second moment too is raised to it.
SMALLEST_M = 2.0**-15
SMALLEST_V = 2.0**-31


class Format(NamedTuple):
    """Another library's optimizer, and the functions that take its state over and give ours back."""

    build: Callable[..., torch.optim.Optimizer]
    take: Callable[[AdamW8bit, dict[str, Any]], None]
    give: Callable[[AdamW8bit], dict[str, Any]]


BITSANDBYTES = Format(BNB.AdamW8bit, from_bitsandbytes, to_bitsandbytes)
TORCH = Format(torch.optim.AdamW, from_torch, to_torch)
FORMATS = pytest.mark.parametrize("other", [BITSANDBYTES, TORCH], ids=["bitsandbytes", "torch"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Return a matrix with 8-bit states, a small one, a vector, and a long vector: 8-bit in bitsandbytes only."""
    shapes = [(64, 80), (5, 7), (300,), (4100,)]
    return [nn.Parameter((0.1 * normal(*shape, seed=i)).to(dtype)) for i, shape in enumerate(shapes)]


def grouped(build: Callable[..., Any], params: list[nn.Parameter], lr: float = 1e-2) -> Any:
    """Return an optimizer of two groups with different settings."""
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": lr / 2, "weight_decay": 0.0}]
    return build(groups, lr=lr, betas=(0.9, 0.995), eps=1e-7, weight_decay=0.1)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    """Step on gradients that shrink after half of the way, so that what the moments remember counts."""
    for step in steps:
        scale = 1.0 if step < STEPS else 0.25
        for index, param in enumerate(params):
            gradient = normal(*param.shape, seed=index) + 0.3 * normal(*param.shape, seed=1000 * (step + 1) + index)
            param.grad = (scale * gradient).to(param.dtype)
        optimizer.step()


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def matrix_of(optimizer: torch.optim.Optimizer) -> Tensor:
    return params_of(optimizer)[0]


def moved(one: list[nn.Parameter], other: list[nn.Parameter]) -> list[Tensor]:
    return [a.detach().double() - b.detach().double() for a, b in zip(one, other)]


def differences(run: list[nn.Parameter], wanted: list[nn.Parameter], start: list[nn.Parameter]) -> list[float]:
    """Return each parameter's distance from where it should be, relative to how far that is from the start."""
    return [float(a.norm() / b.norm()) for a, b in zip(moved(run, wanted), moved(wanted, start))]


def tolerances(dtype: torch.dtype, eight_bit: set[int]) -> list[float]:
    exact = FLOAT32_RUNS + (dtype == torch.bfloat16) * (BFLOAT16_WEIGHTS + BFLOAT16_MOMENTS)
    return [exact + EIGHT_BIT_RUNS * (index in eight_bit) for index in range(4)]


def within(given: list[float], wanted: list[float]) -> bool:
    return all(one <= limit for one, limit in zip(given, wanted))


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def trained(build: Callable[..., Any], dtype: torch.dtype = torch.float32) -> tuple[Any, list[nn.Parameter]]:
    params = parameters(dtype)
    optimizer = grouped(build, params)
    run(optimizer, params, range(STEPS))
    return optimizer, params


def snapshot(optimizer: AdamW8bit) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def equal(one: Any, other: Any) -> bool:
    """Compare nested dicts and lists, tensors bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)
