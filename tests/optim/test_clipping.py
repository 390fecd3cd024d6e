"""Clipping and learning rates that live on the device are part of the step's own passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tolerances import FLOAT32_ROUNDING
from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.optim import AdamW8bit

from .steps import LR, parameters, run, set_gradients
from .test_adamw_surroundings import NoHostReads

# A few float32 roundings of norm, factor and product.
FACTOR = 8 * FLOAT32_ROUNDING


def clipped_by_torch(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
    norm = torch.nn.utils.clip_grad_norm_(params, limit)
    optimizer.step()
    return norm


@pytest.mark.parametrize("limit", [0.5, 1e6], ids=["clips", "leaves-alone"])
def test_a_clipped_step_is_that_of_torchs_clip_grad_norm(limit: float, device: torch.device) -> None:
    ours, theirs = parameters(device=device), parameters(device=device)
    optimizers = AdamW8bit(ours, lr=LR, max_grad_norm=limit, eps=1e-3), AdamW8bit(theirs, lr=LR, eps=1e-3)
    for params in (ours, theirs):
        set_gradients(params, 0, scale=3.0)
    optimizers[0].step()
    norm = clipped_by_torch(theirs, optimizers[1], limit)
    assert optimizers[0].last_grad_norm is not None
    assert float(optimizers[0].last_grad_norm) == pytest.approx(float(norm), rel=FACTOR)
    for one, other in zip(ours, theirs):
        assert torch.allclose(one, other, rtol=0, atol=LR * 100 * FACTOR)


def test_clipping_changes_the_step() -> None:
    """Negative control: with an eps of the size of the gradients, the scale of the gradients matters."""
    results = []
    for limit in (0.5, None):
        params = parameters()
        set_gradients(params, 0, scale=3.0)
        AdamW8bit(params, lr=LR, eps=1e-3, max_grad_norm=limit).step()
        results.append(params[0].detach())
    assert float((results[0] - results[1]).abs().max()) > LR / 100


def test_the_gradients_themselves_stay_as_they_are() -> None:
    params = parameters()
    set_gradients(params, 0, scale=3.0)
    before = [param.grad.clone() for param in params if param.grad is not None]
    AdamW8bit(params, max_grad_norm=0.1).step()
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, before) if param.grad is not None)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_step_that_is_not_finite_is_skipped_also_when_clipping(bad: float) -> None:
    params = parameters()
    optimizer = AdamW8bit(params, lr=LR, max_grad_norm=1.0)
    run(optimizer, params, range(2))
    before = [param.detach().clone() for param in params]
    set_gradients(params, 2)
    assert params[1].grad is not None
    params[1].grad[0, 0] = bad
    optimizer.step()
    assert all(torch.equal(param, other) for param, other in zip(params, before))
    assert (optimizer.steps, optimizer.skipped_steps) == (2, 1)


def test_without_clipping_there_is_no_norm_to_read() -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(1))
    assert optimizer.last_grad_norm is None


def test_clipping_unscales_first() -> None:
    results = []
    for scale in (1.0, 1024.0):
        params = parameters()
        optimizer = AdamW8bit(params, lr=LR, max_grad_norm=0.5)
        set_gradients(params, 0, scale=scale)
        optimizer.grad_scale = torch.tensor(scale)
        optimizer.step()
        assert optimizer.last_grad_norm is not None
        results.append((params[0].detach(), float(optimizer.last_grad_norm)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, math.inf, "1"], ids=repr)
def test_a_limit_that_is_no_positive_number_is_refused(limit: Any) -> None:
    with pytest.raises(InputError, match=r"max_grad_norm.*above 0"):
        AdamW8bit(parameters(), max_grad_norm=limit)


# Learning rates in tensors


def test_a_learning_rate_in_a_tensor_steps_as_the_number(device: torch.device) -> None:
    results = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64, device=device)):
        params = parameters(torch.bfloat16, device)
        run(AdamW8bit(params, lr=lr), params, range(3))  # type: ignore[arg-type]
        results.append(params)
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_a_learning_rate_in_a_tensor_is_read_at_each_step() -> None:
    lr = torch.tensor(0.0, dtype=torch.float64)
    params = parameters()
    optimizer = AdamW8bit(params, lr=lr)  # type: ignore[arg-type]
    before = params[0].detach().clone()
    run(optimizer, params, range(1))
    assert torch.equal(params[0], before)
    lr.fill_(1e-2)
    run(optimizer, params, range(1, 2))
    assert not torch.equal(params[0], before)


def test_everything_a_step_computes_before_its_kernels_stays_on_the_device() -> None:
    """The kernels for CPUs read the skip flag; what stands before them must not, or a GPU would be waited for."""
    params = parameters()
    optimizer = AdamW8bit(params, lr=torch.tensor(1e-2), max_grad_norm=1.0)  # type: ignore[arg-type]
    set_gradients(params, 0)
    with NoHostReads():
        optimizer.step()
