"""The laws that every sampler keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from lisa_kernels.errors import InputError
from lisa_kernels.samplers import (
    AdaptiveSampler,
    CyclicSampler,
    Sampler,
    UniformSampler,
    WeightedSampler,
    sampler_from_state,
)

WEIGHTS = [5.0, 1.0, 0.5, 3.0, 0.0, 2.0, 0.1, 1.0]
LAYERS = len(WEIGHTS)
DRAWS = 20_000


def observed_sampler(seed: int) -> Sampler:
    sampler = AdaptiveSampler(LAYERS, 3, seed)
    sampler.observe({0: 9.0, 1: 0.5, 3: 2.0, 7: 1.0})
    sampler.observe({0: 4.0})
    return sampler


SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "uniform": lambda seed: UniformSampler(LAYERS, 3, seed),
    "uniform-all-layers": lambda seed: UniformSampler(LAYERS, LAYERS, seed),
    "weighted-marginals": lambda seed: WeightedSampler(WEIGHTS, 3, seed),
    "weighted-marginals-no-cap": lambda seed: WeightedSampler(WEIGHTS, 2, seed),
    "weighted-sequential": lambda seed: WeightedSampler(WEIGHTS, 3, seed, design="sequential"),
    "weighted-shallow": lambda seed: WeightedSampler(WEIGHTS, 3, seed, design="shallow"),
    "cyclic-random": lambda seed: CyclicSampler(LAYERS, 1, seed),
    "cyclic-random-blocks": lambda seed: CyclicSampler(LAYERS, 3, seed),
    "cyclic-random-resting": lambda seed: CyclicSampler(LAYERS, 5, seed),
    "cyclic-ascending": lambda seed: CyclicSampler(LAYERS, 3, seed, order="ascending"),
    "cyclic-descending": lambda seed: CyclicSampler(LAYERS, 3, seed, order="descending"),
    "adaptive-unobserved": lambda seed: AdaptiveSampler(LAYERS, 3, seed),
    "adaptive-observed": observed_sampler,
}
SEEDLESS = {"uniform-all-layers", "cyclic-ascending", "cyclic-descending"}

every_sampler = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in SAMPLERS.items()])


def draws(sampler: Sampler, count: int) -> list[tuple[int, ...]]:
    return [sampler.draw(k) for k in range(count)]


@every_sampler
def test_a_draw_has_the_given_size_and_is_distinct_and_ascending(make: Callable[[int], Sampler]) -> None:
    sampler = make(0)
    for draw in draws(sampler, 300):
        assert len(draw) == sampler.active_layers
        assert list(draw) == sorted(set(draw))
        assert set(draw) <= set(range(sampler.layers))


@every_sampler
def test_draw_k_depends_on_seed_and_k_only(make: Callable[[int], Sampler]) -> None:
    in_order = draws(make(7), 50)
    other = make(7)
    assert [other.draw(k) for k in reversed(range(50))] == in_order[::-1]
    assert [other.draw(k) for k in range(50)] == in_order


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in SEEDLESS])
def test_different_seeds_give_different_draws(name: str) -> None:
    assert draws(SAMPLERS[name](0), 50) != draws(SAMPLERS[name](1), 50)


@every_sampler
def test_a_state_through_json_gives_the_same_draws(make: Callable[[int], Sampler]) -> None:
    sampler = make(3)
    state = json.loads(json.dumps(sampler.state_dict(), allow_nan=False))
    assert draws(sampler_from_state(state), 50) == draws(sampler, 50)
    fresh = make(3)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == sampler.state_dict()


@every_sampler
def test_a_state_of_another_seed_is_refused_by_name(make: Callable[[int], Sampler]) -> None:
    with pytest.raises(InputError, match="'seed'"):
        make(3).load_state_dict(make(4).state_dict())


@every_sampler
def test_a_state_of_another_class_is_refused(make: Callable[[int], Sampler]) -> None:
    sampler = make(0)
    other = CyclicSampler(LAYERS) if isinstance(sampler, UniformSampler) else UniformSampler(LAYERS, 1)
    with pytest.raises(InputError, match="'class'"):
        sampler.load_state_dict(other.state_dict())


@every_sampler
def test_inclusion_probabilities_sum_to_the_active_layers(make: Callable[[int], Sampler]) -> None:
    sampler = make(0)
    inclusions = sampler.inclusion_probabilities()
    assert math.fsum(inclusions) == pytest.approx(sampler.active_layers, abs=1e-6)
    assert all(0.0 <= inclusion <= 1.0 for inclusion in inclusions)


def misfit(sampler: Sampler, inclusions: list[float]) -> float:
    """Return the largest distance, in standard errors, between inclusions and those of `DRAWS` draws."""
    visits = [0] * sampler.layers
    for draw in draws(sampler, DRAWS):
        for layer in draw:
            visits[layer] += 1
    return max(
        abs(count / DRAWS - inclusion) / math.sqrt(max(inclusion * (1 - inclusion), 1e-9) / DRAWS)
        for count, inclusion in zip(visits, inclusions)
    )


@every_sampler
def test_inclusion_probabilities_match_simulation(make: Callable[[int], Sampler]) -> None:
    sampler = make(11)
    assert misfit(sampler, sampler.inclusion_probabilities()) < 4.0


def test_the_simulation_notices_wrong_inclusion_probabilities() -> None:
    """Negative control: the sequential design does not have the marginals of the other one."""
    sequential = WeightedSampler(WEIGHTS, 2, 11, design="sequential")
    assert misfit(sequential, WeightedSampler(WEIGHTS, 2).inclusion_probabilities()) > 8.0


@pytest.mark.parametrize("active", [0, -1, LAYERS + 1])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda active: UniformSampler(LAYERS, active), id="uniform"),
        pytest.param(lambda active: WeightedSampler(WEIGHTS, active), id="weighted"),
        pytest.param(lambda active: CyclicSampler(LAYERS, active), id="cyclic"),
        pytest.param(lambda active: AdaptiveSampler(LAYERS, active), id="adaptive"),
    ],
)
def test_an_impossible_number_of_active_layers_is_refused(make: Callable[[int], Sampler], active: int) -> None:
    with pytest.raises(InputError, match=f"active_layers is {active}.*1 to {LAYERS}"):
        make(active)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "lacks"),
        ({"class": "UniformSample", "config": {}}, "did you mean"),
        ({"class": "UniformSampler", "config": {"layer": 3}}, "unusable"),
        ({"class": "AdaptiveSampler", "config": {"layers": 3, "active_layers": 1}}, "differs in 'seed'"),
    ],
    ids=["empty", "misspelt-class", "unknown-argument", "missing-field"],
)
def test_what_is_no_sampler_state_is_refused(state: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sampler_from_state(state)
