"""Sampling by weight, with the scores that the OwLore paper gives for Llama-2-7B."""

from __future__ import annotations

import math

import pytest

from lisa_kernels.errors import InputError
from lisa_kernels.samplers import WeightedSampler

LLAMA_2_7B = [
    *(0.2678, 0.2953, 0.1274, 0.1145, 0.0988, 0.0884, 0.0878, 0.0838),
    *(0.0801, 0.0722, 0.0707, 0.0696, 0.0630, 0.0591, 0.0552, 0.0537),
    *(0.0468, 0.0392, 0.0336, 0.0340, 0.0316, 0.0279, 0.0278, 0.0229),
    *(0.0254, 0.0209, 0.0242, 0.0182, 0.0184, 0.0209, 0.0241, 0.0825),
]
INTENDED = [5 * score / math.fsum(LLAMA_2_7B) for score in LLAMA_2_7B]


def test_marginals_are_those_that_the_scores_intend() -> None:
    assert WeightedSampler(LLAMA_2_7B, 5).inclusion_probabilities() == pytest.approx(INTENDED, abs=1e-12)
    assert INTENDED[1] == pytest.approx(0.675, abs=1e-3)


def test_sequential_draws_include_the_top_layer_less_often_than_intended() -> None:
    """Layer 1 is active in 55 % of the periods, not in the 67.5 % that five times its share suggests."""
    inclusions = WeightedSampler(LLAMA_2_7B, 5, design="sequential").inclusion_probabilities()
    assert inclusions[1] == pytest.approx(0.55, abs=0.005)
    assert max(abs(true - intended) for true, intended in zip(inclusions, INTENDED)) > 0.1


def test_a_weight_of_zero_is_never_drawn() -> None:
    for design in ("marginals", "sequential"):
        sampler = WeightedSampler([1.0, 0.0, 2.0, 3.0], 2, design=design)
        assert sampler.inclusion_probabilities()[1] == 0.0
        assert all(1 not in sampler.draw(k) for k in range(500))


@pytest.mark.parametrize("design", ["marginals", "sequential"])
def test_the_scale_of_the_weights_does_not_matter(design: str) -> None:
    small = WeightedSampler(LLAMA_2_7B, 5, design=design).inclusion_probabilities()
    large = WeightedSampler([1e6 * weight for weight in LLAMA_2_7B], 5, design=design).inclusion_probabilities()
    assert large == pytest.approx(small, abs=1e-9)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_a_weight_that_is_no_weight_is_refused(bad: float) -> None:
    with pytest.raises(InputError, match="weight of layer 1"):
        WeightedSampler([1.0, bad, 1.0], 1)


def test_too_few_positive_weights_are_refused() -> None:
    with pytest.raises(InputError, match="only 1 of 3 weights are positive"):
        WeightedSampler([1.0, 0.0, 0.0], 2)


def test_a_misspelt_design_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'sequential'"):
        WeightedSampler([1.0, 1.0], 1, design="sequentiel")


def test_a_state_with_other_weights_is_refused() -> None:
    with pytest.raises(InputError, match="'weights'"):
        WeightedSampler([1.0, 2.0], 1).load_state_dict(WeightedSampler([1.0, 3.0], 1).state_dict())
