"""What settings follow from where nobody gave them: the rules, and what a sampler makes of a period."""

from __future__ import annotations

import argparse

import pytest

from lisa_kernels.cli import _parser
from lisa_kernels.methods import METHODS
from lisa_kernels.samplers import CyclicSampler, Sampler, UniformSampler
from lisa_kernels.train.defaults import FOLLOWS, RATES, RATES_OF_OLD_RUNS, VISITS, period, rate, warmup_steps
from lisa_kernels.train.options import AUTOMATIC


def test_rates_fall_with_the_width_and_reach_what_was_published() -> None:
    """Whatever is measured at width 576; of 7B models full fine-tuning is published with 1e-5 to 2e-5, OwLore with 3e-4
    and LoRA with 1e-4 to 3e-4.
    """
    assert RATES.keys() == METHODS.keys() == RATES_OF_OLD_RUNS.keys() | {"lora"}
    for method, found in RATES.items():
        assert rate(method, 576) == found
        assert rate(method, 1152) == pytest.approx(found / 2, rel=0.05)
        assert rate(method, 576, scale=0.25) == pytest.approx(4 * found)
    assert 1e-5 <= rate("full", 4096) <= 2e-5
    assert 1e-4 <= rate("owlore", 4096) <= 6e-4
    assert 1e-4 <= rate("lora", 4096) <= 3e-4


def test_owlores_rate_falls_with_the_layers_that_train_at_a_time() -> None:
    """From what was found with 5 of 30 to half of that with 20, and near GaLore's with all; others' do not."""
    found = [rate("owlore", 576, share=active / 30) for active in (1, 5, 20, 30)]
    assert found == [1e-3, 1e-3, 5e-4, 3.1e-4]
    assert rate("lisa", 576, share=1.0) == RATES["lisa"]


def test_a_rate_has_two_digits_so_that_it_can_be_given_as_it_is_told() -> None:
    assert all(float(f"{rate(method, width):.1e}") == rate(method, width) for method in RATES for width in (64, 5120))


@pytest.mark.parametrize(
    ("steps", "layers", "active", "published", "wanted"),
    [
        pytest.param(60, 30, 5, 50, 5, id="short"),
        pytest.param(10_000, 32, 2, 20, 20, id="long"),
        pytest.param(59, 30, 5, 50, 4, id="rounded down"),
        pytest.param(3, 32, 2, 20, 1, id="too short"),
        pytest.param(60, 4, 4, 50, 50, id="nothing to draw"),
    ],
)
def test_a_period_is_as_published_or_short_enough(
    steps: int, layers: int, active: int, published: int, wanted: int
) -> None:  # fmt: skip
    assert period(steps, layers, active, published) == wanted


def visits(sampler: Sampler, steps: int, period: int) -> list[int]:
    """Return how often each layer is drawn in a run."""
    draws = [layer for number in range(0, steps, period) for layer in sampler.draw(number // period)]
    return [draws.count(layer) for layer in range(sampler.layers)]


@pytest.mark.parametrize("active", [1, 2, 5])
def test_in_turn_every_layer_of_thirty_trains_in_sixty_steps(active: int) -> None:
    """With the published period, the negative control, most of them do not."""
    sampler = CyclicSampler(30, active)
    assert min(visits(sampler, 60, period(60, 30, active, 50))) >= VISITS
    assert visits(sampler, 60, 50).count(0) == 30 - 2 * active


@pytest.mark.parametrize("active", [2, 5])
def test_drawn_by_chance_a_layer_trains_twice_on_average(active: int) -> None:
    """Over many seeds; and as each draw is independent, some e⁻² of the layers are left out, not a third or more."""
    found = [visits(UniformSampler(30, active, seed), 60, period(60, 30, active, 50)) for seed in range(200)]
    assert sum(map(sum, found)) / len(found) == 30 * VISITS
    assert sum(run.count(0) for run in found) / len(found) < 30 / 6
    published = [visits(UniformSampler(30, active, seed), 60, 50) for seed in range(200)]
    assert sum(run.count(0) for run in published) / len(published) > 30 / 3


def test_a_twentieth_of_a_run_is_warm_up() -> None:
    assert [warmup_steps(steps) for steps in (1, 19, 20, 60, 200)] == [0, 0, 1, 3, 10]


def test_what_settings_follow_from_are_options() -> None:
    """A name that is none would never be among the flags that displace what was taken."""
    parser = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices["finetune"]
    known = {action.dest for action in parser._actions}
    assert FOLLOWS.keys() == set(AUTOMATIC)
    assert {name for names in FOLLOWS.values() for name in names} <= known
