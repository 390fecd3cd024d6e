"""Shallow sets: the probabilities that were asked for, and backward passes that end higher up."""

from __future__ import annotations

import math

import pytest

from lisa_kernels.errors import InputError
from lisa_kernels.methods import OwLore
from lisa_kernels.samplers import WeightedSampler
from samplers.test_weighted import LLAMA_2_7B

SCORES = {
    "uniform-5": ([1.0] * 32, 5, 18.6, 27.5),
    "uniform-2": ([1.0] * 32, 2, 17.0, 22.2),
    "llama-2-7b": (LLAMA_2_7B, 5, 26.2, 31.3),
    "some-certain": ([100.0, 1.0, 1.0, 50.0, 1.0, 0.0, 1.0], 3, 7.0, 7.0),
}


def depth(draw: tuple[int, ...], layers: int) -> int:
    """Return how many blocks a backward pass goes through."""
    return layers - draw[0]


@pytest.mark.parametrize("name", SCORES)
def test_each_layer_is_in_a_set_as_often_as_its_score_asks_for(name: str) -> None:
    """By the exact sum over the sets, of which there are no more than layers and one; and so it is counted in draws."""
    weights, active, _, _ = SCORES[name]
    sampler = WeightedSampler(weights, active, design="shallow")
    wanted = WeightedSampler(weights, active).inclusion_probabilities()
    assert sampler.inclusion_probabilities() == wanted
    assert len(sampler.sets) <= len(weights) + 1
    assert math.fsum(share for _, share in sampler.sets) == pytest.approx(1.0, abs=1e-12)
    for layer, probability in enumerate(wanted):
        inside = math.fsum(share for chosen, share in sampler.sets if layer in chosen)
        assert inside == pytest.approx(probability, abs=1e-12)
    counts = [0] * len(weights)
    for k in range(2000):
        for layer in sampler.draw(k):
            counts[layer] += 1
    # Drawn by chance, a layer of probability one half would stray by 0.03.
    assert [count / 2000 for count in counts] == pytest.approx(wanted, abs=0.005)


@pytest.mark.parametrize("name", SCORES)
def test_backward_passes_end_higher_up(name: str) -> None:
    """The blocks they go through on average, beside those of draws by chance."""
    weights, active, shallow, by_chance = SCORES[name]
    for design, blocks in (("shallow", shallow), ("marginals", by_chance)):
        sampler = WeightedSampler(weights, active, design=design)
        mean = sum(depth(sampler.draw(k), len(weights)) for k in range(4000)) / 4000
        assert mean == pytest.approx(blocks, abs=0.2)


def test_layers_come_in_turn() -> None:
    """In a run of two visits on average every layer trains: 12 draws of 5 of 30; by chance one in eight is left out."""
    for seed in range(20):
        sampler = WeightedSampler([1.0] * 30, 5, seed, design="shallow")
        assert {layer for k in range(12) for layer in sampler.draw(k)} == set(range(30))


def test_sets_cannot_follow_scores_that_adapt() -> None:
    with pytest.raises(InputError, match="makes its sets once"):
        OwLore(scores="gradient-norm", design="shallow")
