"""Intervals of time: where they lie, which group a time belongs to, and what is drawn inside one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lisa_kernels.errors import InputError
from lisa_kernels.flow import Intervals, Times

KINDS = [Times(), Times("logit-normal"), Times("logit-normal", mean=-0.5, std=1.4, shift=3.0), Times(shift=0.5)]


def test_uniform_boundaries_are_of_equal_length() -> None:
    """Whatever the distribution of times is."""
    assert Intervals.make(4, "uniform", "logit-normal").bounds == (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize("times", KINDS, ids=repr)
def test_quantiles_give_each_group_its_share_of_the_times(times: Times) -> None:
    """Counted on times that are drawn from the whole of [0, 1], after the shift."""
    drawn = Intervals.make(1, times=times).draw(0, 40_000, seed=1, step=0)
    counts = Intervals.make(5, "quantile", times).groups_of(drawn).bincount(minlength=5)
    # Five standard deviations of a count.
    assert (counts - 8_000).abs().max() < 5 * (40_000 * 0.2 * 0.8) ** 0.5


def test_the_logit_normal_times_are_those_of_their_definition() -> None:
    """The logistic function of a normal number, and the shift of the noise level, against 200,000 of both."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.sigmoid(-(torch.randn(200_000, generator=generator, dtype=torch.float64) * 1.2 + 0.3))
    t = 1 - 2.5 * noise / (1 + 1.5 * noise)
    shares = torch.tensor([0.05, 0.3, 0.5, 0.9])
    times = Times("logit-normal", 0.3, 1.2, 2.5)
    assert torch.allclose(times.quantiles(shares), t.quantile(shares.double()), atol=5e-3)


@pytest.mark.parametrize("times", KINDS, ids=repr)
def test_the_cumulative_share_inverts_the_quantiles(times: Times) -> None:
    """At inner points and at both ends."""
    shares = torch.linspace(0, 1, 21, dtype=torch.float64)
    back = torch.tensor([times.cumulative(float(t)) for t in times.quantiles(shares)], dtype=torch.float64)
    assert torch.allclose(back, shares, atol=1e-12)


def test_intervals_are_half_open_and_closed_at_the_end() -> None:
    """A boundary belongs to the group that begins there; 1 to the last; a hair beyond the ends is rounding."""
    intervals = Intervals.make(4, "uniform")
    t = torch.tensor([-1e-6, 0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1.0, 1.000001])
    assert intervals.groups_of(t).tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3]
    assert [intervals.group_of(bound) for bound in intervals.bounds] == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_boundary_begins_its_interval_in_every_precision(dtype: torch.dtype) -> None:
    """A third is no number of any of them: the time is compared with the boundary as it would be held there."""
    intervals = Intervals.make(3, "uniform")
    assert intervals.groups_of(torch.tensor(intervals.bounds).to(dtype)).tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("t", [-0.01, 1.01, 500.0, float("nan")])
def test_a_time_beyond_rounding_is_refused(t: float) -> None:
    """A solver's overshoot of more than rounding, or a model's own clock."""
    with pytest.raises(InputError, match=r"from 0 \(noise\) to 1 \(data\)"):
        Intervals.make(4).group_of(torch.tensor([0.5, t]))


def test_a_batch_of_several_groups_is_refused_and_never_routed_by_its_mean() -> None:
    """The message names the groups and says what to do."""
    with pytest.raises(InputError, match=r"groups 0, 3.*split the batch"):
        Intervals.make(4).group_of(torch.tensor([0.1, 0.9]))


@pytest.mark.parametrize("times", KINDS, ids=repr)
@pytest.mark.parametrize("overlap", [0.0, 0.05])
def test_what_is_drawn_lies_inside_the_widened_interval(times: Times, overlap: float) -> None:
    """And reaches to both of its ends; without overlap every time is of the group it was drawn for."""
    intervals = Intervals.make(3, "quantile", times, overlap)
    for group in range(3):
        low, high = intervals.training_interval(group)
        drawn = intervals.draw(group, 4_000, seed=3, step=group).double()
        assert low <= float(drawn.min()) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < float(drawn.max()) <= high
        if not overlap:
            assert intervals.groups_of(drawn.float()).unique().tolist() == [group]


def test_the_overlap_is_a_share_of_the_interval_itself() -> None:
    """On both sides, cut at the ends of time; as wide as all intervals it is all of time."""
    intervals = Intervals((0.0, 0.2, 0.6, 1.0), overlap=0.05)
    widened = [end for group in range(3) for end in intervals.training_interval(group)]
    assert widened == pytest.approx([0.0, 0.21, 0.18, 0.62, 0.58, 1.0])
    assert Intervals((0.0, 0.2, 1.0), overlap=9.0).training_interval(0) == (0.0, 1.0)


def test_inside_an_interval_times_have_the_density_of_the_whole() -> None:
    """Times of one group are those of all that fall into it: compared at quantiles of 100,000 of both."""
    intervals = Intervals.make(4, "uniform", Times("logit-normal", 0.4, 0.8))
    everywhere = Intervals.make(1, times=intervals.times).draw(0, 200_000, seed=0, step=0)
    low, high = intervals.interval(1)
    fallen = everywhere[(everywhere >= low) & (everywhere < high)]
    drawn = intervals.draw(1, 100_000, seed=0, step=1)
    shares = torch.tensor([0.1, 0.5, 0.9])
    assert torch.allclose(drawn.quantile(shares), fallen.quantile(shares), atol=4e-3)


def test_a_draw_is_a_function_of_seed_step_and_call() -> None:
    """The same numbers give the same times, and any other other ones."""
    intervals = Intervals.make(2)
    first = intervals.draw(0, 64, seed=5, step=7)
    assert torch.equal(first, intervals.draw(0, 64, seed=5, step=7))
    for other in ({"seed": 6, "step": 7}, {"seed": 5, "step": 8}, {"seed": 5, "step": 7, "call": 1}):
        assert not torch.equal(first, intervals.draw(0, 64, **other))


def test_another_default_device_changes_nothing() -> None:
    """Boundaries are numbers of the host, and draws are made there, wherever new tensors would be."""
    expected = Intervals.make(3, times="logit-normal").draw(1, 5, seed=0, step=0)
    with torch.device("meta"):
        found = Intervals.make(3, times="logit-normal").draw(1, 5, seed=0, step=0)
        assert Intervals.make(3).group_of(0.5) == 1
    assert torch.equal(found, expected)


def test_a_state_makes_the_same_intervals() -> None:
    """Bounds to the last bit, distribution and overlap."""
    intervals = Intervals.make(3, "quantile", Times("logit-normal", shift=2.0), 0.05)
    assert Intervals.from_state(intervals.state()) == intervals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"groups": 0}, "groups is 0"),
        ({"groups": 2.0}, "groups is 2.0"),
        ({"boundaries": "quantiles"}, "did you mean 'quantile'"),
        ({"boundaries": [0.0, 1.0]}, "5 are wanted"),
        ({"boundaries": [0.0, 0.5, 0.4, 0.8, 1.0]}, "rise from 0 to 1"),
        ({"boundaries": [0.0, 0.5, 0.5, 0.8, 1.0]}, "rise from 0 to 1"),
        ({"boundaries": [0.1, 0.2, 0.4, 0.8, 1.0]}, "rise from 0 to 1"),
        ({"boundaries": [0, 250, 500, 750, 1000]}, "rise from 0 to 1"),
        ({"boundaries": [0.0, float("nan"), 0.5, 0.8, 1.0]}, "a boundary is nan"),
        ({"times": "logitnormal"}, "did you mean 'logit-normal'"),
        ({"overlap": -0.1}, "overlap is -0.1"),
        ({"overlap": "5%"}, "overlap is '5%'"),
    ],
)
def test_what_is_no_set_of_intervals_is_refused(settings: dict[str, Any], said: str) -> None:
    """Each with what was given and what is wanted."""
    with pytest.raises(InputError, match=said):
        Intervals.make(**{"groups": 4, **settings})


@pytest.mark.parametrize("wrong", [{"std": 0.0}, {"shift": -1.0}, {"mean": float("inf")}], ids=repr)
def test_numbers_of_a_distribution_are_checked(wrong: dict[str, float]) -> None:
    """A width or shift of no meaning."""
    with pytest.raises(InputError, match="a finite number"):
        Times("logit-normal", **wrong)
