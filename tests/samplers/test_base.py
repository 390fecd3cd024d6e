"""The base of all samplers: streams, orders, and which field of a state differs."""

from __future__ import annotations

import random

import pytest

from lisa_kernels.errors import InputError
from lisa_kernels.samplers import UniformSampler
from lisa_kernels.samplers.base import random_order


def test_a_random_order_is_a_permutation_that_its_stream_decides() -> None:
    items = [3, 1, 4, 15, 9, 2, 6]
    order = random_order(items, random.Random("a"))
    assert sorted(order) == sorted(items)
    assert order == random_order(items, random.Random("a"))
    assert order != random_order(items, random.Random("b"))


def test_draws_are_the_same_on_every_machine_and_version() -> None:
    """A change of these draws breaks the resuming of runs saved before it."""
    assert [UniformSampler(32, 2, seed=0).draw(k) for k in range(4)] == [(8, 13), (10, 23), (1, 9), (13, 18)]


def test_a_negative_draw_is_refused() -> None:
    with pytest.raises(InputError, match="draw -1"):
        UniformSampler(4, 2).draw(-1)


def test_no_layers_are_refused() -> None:
    with pytest.raises(InputError, match="0 layers"):
        UniformSampler(0, 1)


def test_the_differing_field_of_a_state_is_named() -> None:
    with pytest.raises(InputError, match=r"'active_layers'.*has 3.*has 2"):
        UniformSampler(8, 2).load_state_dict(UniformSampler(8, 3).state_dict())


def test_observing_changes_nothing_in_a_sampler_that_does_not_adapt() -> None:
    sampler = UniformSampler(8, 2)
    before = sampler.state_dict()
    sampler.observe({0: 5.0})
    assert sampler.state_dict() == before
