"""Sampling by observed gradient norms."""

from __future__ import annotations

import math

import pytest

from lisa_kernels.errors import InputError
from lisa_kernels.samplers import AdaptiveSampler


def test_nothing_observed_is_uniform() -> None:
    assert AdaptiveSampler(4, 2).inclusion_probabilities() == [0.5] * 4


def test_inclusion_is_the_norm_share_mixed_with_exploration() -> None:
    sampler = AdaptiveSampler(4, 1, exploration=0.2)
    sampler.observe({0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0})
    assert sampler.inclusion_probabilities() == pytest.approx([0.37, 0.29, 0.21, 0.13])


def test_an_unobserved_layer_counts_as_the_mean_of_the_observed() -> None:
    sampler = AdaptiveSampler(3, 1, exploration=0.3)
    sampler.observe({0: 1.0, 1: 3.0})
    share = 0.7 / 6
    assert sampler.inclusion_probabilities() == pytest.approx([0.1 + share, 0.1 + 3 * share, 0.1 + 2 * share])


def test_averages_are_exponential_and_begin_at_the_first_norm() -> None:
    sampler = AdaptiveSampler(2, 1, momentum=0.75)
    sampler.observe({0: 8.0})
    sampler.observe({0: 4.0})
    assert sampler.averages == [7.0, None]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_ignored(bad: float) -> None:
    sampler = AdaptiveSampler(2, 1)
    sampler.observe({0: 8.0, 1: bad})
    sampler.observe({0: bad})
    assert sampler.averages == [8.0, None]


def test_norms_of_zero_everywhere_are_uniform() -> None:
    sampler = AdaptiveSampler(2, 1)
    sampler.observe({0: 0.0, 1: 0.0})
    assert sampler.inclusion_probabilities() == [0.5, 0.5]


def test_observing_changes_what_is_drawn() -> None:
    sampler, still = AdaptiveSampler(8, 1), AdaptiveSampler(8, 1)
    sampler.observe(dict.fromkeys(range(7), 0.0) | {7: 1.0})
    assert sum(sampler.draw(k) == (7,) for k in range(200)) > 2 * sum(still.draw(k) == (7,) for k in range(200))


@pytest.mark.parametrize(
    ("norms", "message"), [({5: 1.0}, "layer 5"), ({-1: 1.0}, "layer -1"), ({0: -2.0}, "not negative")]
)
def test_an_observation_that_cannot_be_is_refused(norms: dict[int, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AdaptiveSampler(4, 1).observe(norms)


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": -0.1}, {"exploration": 0.0}, {"exploration": 2.0}])
def test_an_option_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        AdaptiveSampler(4, 1, **options)


def test_a_state_with_averages_of_other_layers_is_refused() -> None:
    state = AdaptiveSampler(4, 1).state_dict()
    with pytest.raises(InputError, match="'averages'"):
        AdaptiveSampler(4, 1).load_state_dict({**state, "averages": [1.0]})
