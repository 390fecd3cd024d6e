"""Random numbers are keyed, and a gradient that is not finite skips the whole step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lisa_kernels.optim import AdamW8bit

from .steps import LR, normal, parameters, run, set_gradients, tensors_of

# Random numbers


def test_two_runs_of_one_seed_are_equal_and_of_another_differ() -> None:
    results = []
    for seed in (0, 0, 1):
        params = parameters(torch.bfloat16)
        run(AdamW8bit(params, seed=seed), params, range(3))
        results.append(params[0].detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_two_equal_parameters_are_rounded_differently() -> None:
    params = [nn.Parameter(normal(64, 80, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdamW8bit(params)
    for param in params:
        param.grad = normal(64, 80, seed=1, dtype=torch.bfloat16)
    optimizer.step()
    assert not torch.equal(*params)


def test_nearest_rounding_needs_no_random_numbers() -> None:
    results = []
    for seed in (0, 1):
        params = parameters(torch.bfloat16)
        run(AdamW8bit(params, seed=seed, rounding="nearest"), params, range(3))
        results.append(params[0].detach())
    assert torch.equal(*results)


def test_global_random_state_is_neither_used_nor_moved() -> None:
    params = parameters(torch.bfloat16)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run(AdamW8bit(params), params, range(2))
    assert torch.equal(torch.get_rng_state(), before)


# Gradients that are not finite


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, 1e25], ids=["nan", "inf", "minus-inf", "square-overflows"]
)
@pytest.mark.parametrize("where", [0, 1, 2], ids=["8-bit", "small-matrix", "vector"])
def test_one_bad_gradient_skips_the_step_of_all_parameters(where: int, bad: float, device: torch.device) -> None:
    params = parameters(device=device)
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(2))
    before = [tensor.clone() for tensor in tensors_of(optimizer)]
    set_gradients(params, 2)
    params[where].grad.view(-1)[3] = bad  # type: ignore[union-attr]
    optimizer.step()
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors_of(optimizer), before))
    assert (optimizer.steps, optimizer.skipped_steps) == (2, 1)
    assert bool(optimizer.last_skip(params[0].device))
    run(optimizer, params, range(3, 4))
    assert (optimizer.steps, optimizer.skipped_steps) == (3, 1)
    assert not bool(optimizer.last_skip(params[0].device))


def test_a_skipped_step_uses_no_random_numbers() -> None:
    """With and without a bad step in between, the following steps are the same."""
    results = []
    for bad_step in (False, True):
        params = parameters(torch.bfloat16)
        optimizer = AdamW8bit(params)
        run(optimizer, params, range(1))
        if bad_step:
            set_gradients(params, 9, scale=math.inf)
            optimizer.step()
        run(optimizer, params, range(1, 3))
        results.append([tensor.clone() for tensor in tensors_of(optimizer)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_large_finite_gradients_are_taken() -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    set_gradients(params, 0, scale=1e15)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(optimizer))


@pytest.mark.parametrize(("value", "skipped"), [(9.9e15, 0), (1.1e16, 20)], ids=["below", "above"])
def test_the_largest_gradient_that_is_taken_never_overflows(value: float, skipped: int) -> None:
    """Its squares add up to v / (1 − β₂), in both kinds of state; beyond it every step is skipped."""
    params = parameters()
    before = [param.detach().clone() for param in params]
    optimizer = AdamW8bit(params, betas=(0.9, 0.99999))
    for _ in range(20):
        for param in params:
            param.grad = torch.full_like(param, value)
        optimizer.step()
    assert optimizer.skipped_steps == skipped
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(optimizer))
    assert all(torch.equal(param, old) is bool(skipped) for param, old in zip(params, before))


def scaled_run(params: list[nn.Parameter], inf_step: int | None, unscale: bool) -> tuple[AdamW8bit, list[float]]:
    """Train five steps through a GradScaler, one of them with an infinity; return its scales too."""
    optimizer, scaler = AdamW8bit(params, lr=LR), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    for step in range(5):
        optimizer.zero_grad()
        loss = sum((param * normal(*param.shape, seed=step)).sum() for param in params)
        scaler.scale(loss).backward()
        if step == inf_step:
            params[1].grad[0, 0] = math.inf  # type: ignore[index]
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return optimizer, scales


@pytest.mark.parametrize("unscale", [False, True], ids=["unscaled-by-the-step", "unscaled-before"])
def test_grad_scaler_steps_as_without_scaling(unscale: bool) -> None:
    scaled, plain = parameters(), parameters()
    scaled_run(scaled, None, unscale)
    optimizer = AdamW8bit(plain, lr=LR)
    for step in range(5):
        for param in plain:
            param.grad = normal(*param.shape, seed=step)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(scaled, plain))


@pytest.mark.parametrize("unscale", [False, True], ids=["unscaled-by-the-step", "unscaled-before"])
def test_grad_scaler_halves_its_scale_after_an_infinity_and_the_step_is_counted(unscale: bool) -> None:
    optimizer, scales = scaled_run(parameters(), 2, unscale)
    assert scales == [1024.0, 1024.0, 512.0, 512.0, 512.0]
    assert (optimizer.steps, optimizer.skipped_steps) == (4, 1)
