"""Sampling in turn."""

from __future__ import annotations

from itertools import pairwise

import pytest

from lisa_kernels.errors import InputError
from lisa_kernels.samplers import CyclicSampler

SHAPES = [(layers, active) for layers in (1, 2, 3, 5, 6, 7, 8, 12, 13) for active in range(1, layers + 1)]


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_visits_never_differ_by_more_than_one(order: str) -> None:
    for layers, active in SHAPES:
        sampler = CyclicSampler(layers, active, seed=2, order=order)
        visits = [0] * layers
        for k in range(4 * layers):
            draw = sampler.draw(k)
            assert len(set(draw)) == active
            for layer in draw:
                visits[layer] += 1
            assert max(visits) - min(visits) <= 1, f"{layers} layers, {active} active, draw {k}"


@pytest.mark.parametrize(("layers", "active"), [(2, 1), (3, 1), (8, 1), (12, 4), (13, 2), (16, 2), (9, 8)])
def test_no_layer_is_drawn_twice_in_a_row(layers: int, active: int) -> None:
    """Of 9 layers with 8 active the one that rests is never the same twice in a row."""
    chosen = [set(CyclicSampler(layers, active, seed=5).draw(k)) for k in range(400)]
    moving = chosen if 2 * active <= layers else [set(range(layers)) - draw for draw in chosen]
    assert not any(before & after for before, after in pairwise(moving))


def test_random_cycles_are_reshuffled() -> None:
    sampler = CyclicSampler(8, 1, seed=0)
    cycles = {tuple(sampler.draw(8 * cycle + k)[0] for k in range(8)) for cycle in range(20)}
    assert len(cycles) == 20
    assert all(sorted(cycle) == list(range(8)) for cycle in cycles)


def test_fixed_orders_run_through_the_layers() -> None:
    ascending = CyclicSampler(5, 2, order="ascending")
    descending = CyclicSampler(5, 2, order="descending")
    assert [ascending.draw(k) for k in range(4)] == [(0, 1), (2, 3), (0, 4), (1, 2)]
    assert [descending.draw(k) for k in range(4)] == [(3, 4), (1, 2), (0, 4), (2, 3)]


def test_a_misspelt_order_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'random'"):
        CyclicSampler(5, order="randon")
