"""The whole optimizer against float64 AdamW over hundreds of steps that nothing synchronises, and real peers beside it.

bitsandbytes' own optimizer runs here with its quantiser for CPUs, which gives no unsigned code below 7 and so cannot
lose a second moment; what its kernels for GPUs do, the nearest code of the same map, is the codec `DYNAMIC_NEAREST`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from tolerances import STANDARD_ERRORS, TRAJECTORY_NMSE, TRAJECTORY_WORST_UPDATE
from torch import Tensor, nn

from bench.codecs import DYNAMIC_NEAREST, FLOAT32, OURS
from bench.numerics import (
    CodecRun,
    Run,
    bitsandbytes_optimizer,
    follow,
    noisy_quadratic,
    our_optimizer,
    record_gradients,
    replay,
    shrinking,
)
from lisa_kernels import AdamW8bit

COUNT = 4096
# How far the mean of √v over its exact value may be from 1 at β₂ = 0.999. Unbiased rounding of v to steps of an eighth
# leaves v a relative variance s² of up to 0.1 and √v a mean that is s² / 8 too small: 1 to 2 %.
ROOT_V = 0.05


@pytest.mark.parametrize("decades", [1.0, 3.0, 5.0], ids=["1-decade", "3-decades", "5-decades"])
def test_800_steps_of_the_optimizer_stay_near_float64(decades: float) -> None:
    outcome = follow(our_optimizer(COUNT), noisy_quadratic(decades))
    assert outcome.nmse <= TRAJECTORY_NMSE
    assert outcome.worst_update <= TRAJECTORY_WORST_UPDATE


@pytest.mark.parametrize("decades", [3.0, 5.0], ids=["3-decades", "5-decades"])
def test_bitsandbytes_own_optimizer_leaves_the_same_trajectory(decades: float) -> None:
    """Negative control with a real peer: ten times our limit and more, although nothing explodes on CPUs."""
    assert follow(bitsandbytes_optimizer(COUNT), noisy_quadratic(decades)).nmse > 10 * TRAJECTORY_NMSE


def test_its_map_rounded_to_nearest_takes_updates_of_thousands_of_learning_rates() -> None:
    """Negative control: as its kernels for GPUs store the moments, second ones become 0 while first ones survive."""
    outcome = follow(CodecRun(DYNAMIC_NEAREST, COUNT), noisy_quadratic(3.0))
    assert outcome.nmse > 1
    assert outcome.worst_update > 1000


def test_the_measurement_itself_is_exact() -> None:
    """Moments kept in float32 leave no more than float32's own rounding: 800 of 2⁻²⁴, squared, with room."""
    outcome = follow(CodecRun(FLOAT32, COUNT), noisy_quadratic(5.0, steps=200))
    assert outcome.nmse < (200 * 2.0**-24) ** 2
    assert outcome.worst_update == pytest.approx(outcome.exact_worst_update, rel=1e-3)
    assert outcome.root_v == pytest.approx(1.0, abs=1e-5)


def test_the_codec_as_compared_is_the_codec_of_the_optimizer() -> None:
    """Of other random numbers, hence of another error: but of the same size."""
    errors = [
        follow(start(COUNT), noisy_quadratic(3.0, steps=200)).nmse for start in (our_optimizer, partial(CodecRun, OURS))
    ]
    assert 0.8 < errors[0] / errors[1] < 1.25


def test_root_v_follows_gradients_that_shrink() -> None:
    gradients, shrinks = shrinking()
    assert abs(follow(our_optimizer(COUNT), gradients, shrinks).root_v - 1) <= ROOT_V


@pytest.mark.parametrize(
    "start",
    [partial(our_optimizer, rounding="nearest"), bitsandbytes_optimizer],
    ids=["ours-to-nearest", "bitsandbytes"],
)
def test_nearest_rounding_keeps_root_v_where_it_was(start: Callable[[int], Run]) -> None:
    """Negative control: a step of 0.1 % never reaches the next code, so √v stays 1.8 times too large."""
    gradients, shrinks = shrinking()
    assert follow(start(COUNT), gradients, shrinks).root_v > 1.7


def moved_at_rate_1e_6(rounding: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return float64: how far bfloat16 and float32 weights moved in 100 steps, and the bfloat16 spacing at each."""
    generator = torch.Generator().manual_seed(5)
    start = (torch.rand(256, 256, generator=generator) * 1.4 + 0.55).bfloat16()
    direction = torch.randn(256, 256, generator=generator).sign()
    params = [nn.Parameter(start.clone()), nn.Parameter(start.float())]
    optimizers = [AdamW8bit([param], lr=1e-6, weight_decay=0.0, rounding=rounding) for param in params]
    for _ in range(100):
        grad = direction * (1 + 0.3 * torch.randn(256, 256, generator=generator))
        for param, optimizer in zip(params, optimizers):
            param.grad = grad.to(param.dtype)
            optimizer.step()
    bfloat16, float32 = (param.detach().double() - start.double() for param in params)
    return bfloat16, float32, 2.0 ** (start.double().log2().floor() - 7)


def test_bfloat16_weights_follow_float32_at_1e_6_within_the_roundings_standard_error() -> None:
    """A weight that moves by d takes a spacing q with odds d / q: a variance of d·q, whatever the number of steps."""
    moved, wanted, spacing = moved_at_rate_1e_6("stochastic")
    for side in (wanted > 0, wanted < 0):
        count = int(side.sum())
        standard_error = math.sqrt(float((wanted[side].abs() * spacing[side]).sum())) / count
        assert abs(float((moved - wanted)[side].mean())) <= STANDARD_ERRORS * standard_error
        # So fine a check that weights which stood still would fail it.
        assert abs(float(wanted[side].mean())) > 3 * STANDARD_ERRORS * standard_error


def test_bfloat16_weights_to_nearest_stand_still_at_1e_6() -> None:
    """Negative control."""
    moved, wanted, _ = moved_at_rate_1e_6("nearest")
    assert float(moved.abs().max()) == 0.0
    assert float(wanted.abs().mean()) > 5e-5


@pytest.mark.slow
def test_recorded_gradients_of_a_small_model_are_followed() -> None:
    """Open loop on noise, the total update is mostly a random walk: the error is a larger share of it than above."""
    recorded = record_gradients(steps=120, blocks=16)
    assert {grads.shape for grads in recorded.values()} == {torch.Size((120, 16 * 256))}
    ours, peer = (replay(start, recorded) for start in (our_optimizer, partial(CodecRun, DYNAMIC_NEAREST)))
    for name in recorded:
        assert ours[name].nmse <= 2e-2, name
        assert ours[name].worst_update <= 1.25 * ours[name].exact_worst_update, name
        assert abs(ours[name].root_v - 1) <= ROOT_V, name
    assert peer["embedding"].worst_update > 10 * ours["embedding"].worst_update
