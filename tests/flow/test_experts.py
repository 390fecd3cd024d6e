"""Timestep experts as a record: what may be asked for, and in which order groups train."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lisa_kernels import InputError, TimestepExperts
from lisa_kernels.flow import Clock, Times


def test_groups_take_turns_in_the_order_of_time() -> None:
    """Each draw is one contiguous group, from the noisiest on, round and round."""
    sampler = TimestepExperts(groups=3).make_sampler(6, seed=0, scores=None)
    assert sampler is not None
    assert [sampler.draw(k) for k in range(4)] == [(0, 1), (2, 3), (4, 5), (0, 1)]


def test_the_settings_are_plain_values() -> None:
    """A checkpoint holds them as JSON."""
    method = TimestepExperts(groups=2, boundaries=[0, 0.4, 1], times=Times("logit-normal"), clock=Clock("t", 1000, 0))
    settings = method.settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["boundaries"] == [0, 0.4, 1]


def test_moments_may_be_dropped_where_periods_are_long() -> None:
    """As BAdam does; with one group there is no switch at all."""
    TimestepExperts(retired_state="drop", period=50)
    TimestepExperts(groups=1, retired_state="drop")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"retired_state": "drop"}, "forgets a group's moments at each switch"),
        ({"groups": 0}, "groups is 0"),
        ({"period": 0}, "period is 0"),
        ({"boundaries": "halves"}, "placement of boundaries"),
        ({"boundaries": [0.0, 1.0]}, "5 are wanted"),
        ({"boundaries": [0.0, 0.9, 0.5, 0.95, 1.0]}, "rise from 0 to 1"),
        ({"times": "beta"}, "distribution of times"),
        ({"overlap": -1}, "overlap is -1"),
        ({"retired_state": "stay"}, "retired_state"),
        ({"resting_weights": "drop"}, "resting_weights"),
        ({"shared_rate": -1.0}, "shared_rate is -1.0"),
        ({"clock": "timestep"}, "clock is 'timestep'"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], said: str) -> None:
    """Before there is a model."""
    with pytest.raises(InputError, match=said):
        TimestepExperts(**settings)


def test_groups_that_do_not_divide_the_layers_are_refused() -> None:
    """Both numbers are named."""
    with pytest.raises(InputError, match="10 layers do not divide into 4 groups"):
        TimestepExperts(groups=4).make_sampler(10, seed=0, scores=None)
