"""Fixed-size designs against enumeration."""

from __future__ import annotations

import random
from itertools import combinations, permutations

import pytest

from lisa_kernels.samplers.designs import capped_inclusions, race_draw, race_inclusions, systematic_draw


def enumerated_inclusions(weights: list[float], size: int) -> list[float]:
    """Return the inclusion probabilities of successive draws without replacement by going through all of them."""
    inclusions = [0.0] * len(weights)
    for order in permutations(range(len(weights)), size):
        probability, left = 1.0, sum(weights)
        for item in order:
            probability *= weights[item] / left if weights[item] else 0.0
            left -= weights[item]
        for item in order:
            inclusions[item] += probability
    return inclusions


RACES = {
    "one-of-two": ([1.0, 2.0], 1),
    "equal": ([1.0] * 6, 3),
    "ramp": ([1.0, 2.0, 3.0, 4.0, 5.0], 3),
    "with-zeros": ([0.0, 2.0, 3.0, 0.0, 1.0], 2),
    "one-dominates": ([1000.0, 1.0, 1.0, 1.0, 1.0, 1.0], 3),
    "nine-decades": ([1.0, 1e-3, 1e-6, 1e-9, 1.0], 3),
    "all-but-one": ([1.0, 2.0, 3.0, 4.0], 3),
    "any-scale": ([1e200, 3e200, 2e200], 2),
}


@pytest.mark.parametrize(("weights", "size"), RACES.values(), ids=RACES.keys())
def test_race_inclusions_equal_enumeration(weights: list[float], size: int) -> None:
    assert race_inclusions(weights, size) == pytest.approx(enumerated_inclusions(weights, size), abs=1e-6)


def test_a_race_that_all_positive_weights_win_is_certain() -> None:
    assert race_inclusions([2.0, 0.0, 1.0], 2) == [1.0, 0.0, 1.0]


def test_race_inclusions_hold_for_many_layers() -> None:
    inclusions = race_inclusions([1.0 / (i + 1) for i in range(80)], 30)
    assert sum(inclusions) == pytest.approx(30, abs=1e-6)
    assert inclusions == sorted(inclusions, reverse=True)


def test_a_race_never_draws_a_zero_weight() -> None:
    stream = random.Random("race")
    assert all(1 not in race_draw([1.0, 0.0, 1e-9, 1e-9], 2, stream) for _ in range(1000))


CAPS = {
    "none": ([1.0, 1.0, 2.0], 1, [0.25, 0.25, 0.5]),
    "one": ([8.0, 1.0, 1.0], 2, [1.0, 0.5, 0.5]),
    "repeatedly": ([100.0, 8.0, 1.0, 1.0], 3, [1.0, 1.0, 0.5, 0.5]),
    "all": ([5.0, 1.0, 2.0], 3, [1.0, 1.0, 1.0]),
    "all-positive": ([5.0, 0.0, 1e-300], 2, [1.0, 0.0, 1.0]),
    "huge": ([1e308, 1e308, 1e308], 1, [1 / 3] * 3),
}


@pytest.mark.parametrize(("weights", "size", "expected"), CAPS.values(), ids=CAPS.keys())
def test_inclusions_are_proportional_and_capped(weights: list[float], size: int, expected: list[float]) -> None:
    assert capped_inclusions(weights, size) == pytest.approx(expected, abs=1e-12)


def test_a_systematic_draw_can_hold_any_two_items() -> None:
    """In a fixed order the points would only ever hit items that lie half a round apart."""
    stream = random.Random("pairs")
    assert {systematic_draw([0.5] * 4, stream) for _ in range(300)} == set(combinations(range(4), 2))


@pytest.mark.parametrize("size", [1, 2, 5, 9, 10])
def test_a_systematic_draw_has_exactly_the_size_that_its_inclusions_sum_to(size: int) -> None:
    stream = random.Random(f"sizes {size}")
    for _ in range(500):
        inclusions = capped_inclusions([stream.random() ** 4 + 1e-9 for _ in range(10)], size)
        draw = systematic_draw(inclusions, stream)
        assert len(set(draw)) == len(draw) == size
