"""The route: groups of blocks in the order of time, the active one in training, by time elsewhere."""

from __future__ import annotations

import pytest
import torch

from lisa_kernels.errors import InputError
from lisa_kernels.flow import Intervals, Route


@pytest.fixture
def route() -> Route:
    """Twelve blocks in three groups."""
    return Route(12, Intervals.make(3, "uniform"))


def test_groups_are_contiguous_and_the_first_takes_the_noisiest_times(route: Route) -> None:
    """Every block is in one group; t = 0 is noise."""
    assert [list(route.blocks_of(group)) for group in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [route.group_of_block(block) for block in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert route.size == 4
    assert route.choose(0.0, training=False) == 0


@pytest.mark.parametrize("layers", [10, 2, 0])
def test_groups_that_do_not_divide_the_layers_are_refused(layers: int) -> None:
    """Both numbers are named."""
    with pytest.raises(InputError, match=f"{layers} layers do not divide into 3 groups"):
        Route(layers, Intervals.make(3))


@pytest.mark.parametrize("number", [-1, 12])
def test_groups_and_blocks_that_are_not_there_are_refused(route: Route, number: int) -> None:
    """Negative ones too: they would count from the end."""
    with pytest.raises(InputError, match="there are groups 0 to 2"):
        route.blocks_of(number)
    with pytest.raises(InputError, match="there are blocks 0 to 11"):
        route.group_of_block(number)


def test_the_active_group_runs_in_training_and_the_time_chooses_elsewhere(route: Route) -> None:
    """Without an active group training goes by time too."""
    t = torch.tensor([0.7, 0.9])
    assert route.choose(t, training=True) == 2
    route.active = 1
    assert route.choose(torch.tensor([0.4, 0.5]), training=True) == 1
    assert route.choose(t, training=False) == 2


def test_times_of_another_group_do_not_train_the_active_one(route: Route) -> None:
    """A user's own draw of t would train every expert on everything, without a word."""
    route.active = 1
    with pytest.raises(
        InputError, match=r"group 1, which trains now, is for 0\.333333 to 0\.666667.*times\(batch_size\)"
    ):
        route.choose(torch.rand(64), training=True)


def test_the_overlap_may_train_and_is_evaluated_by_the_neighbour() -> None:
    """A time just beyond the border is drawn for a group and, in evaluation, run by the next."""
    route = Route(4, Intervals.make(2, "uniform", overlap=0.05))
    route.active = 0
    assert route.choose(torch.tensor([0.52]), training=True) == 0
    assert route.choose(torch.tensor([0.52]), training=False) == 1


def test_a_batch_of_several_groups_is_refused_or_split(route: Route) -> None:
    """The places of a split are those of the whole batch, each once."""
    t = torch.tensor([0.9, 0.1, 0.95, 0.5])
    with pytest.raises(InputError, match="split the batch"):
        route.choose(t, training=False)
    assert [(group, places.tolist()) for group, places in route.split(t)] == [(0, [1]), (1, [3]), (2, [0, 2])]


def test_a_held_group_runs_at_any_time_and_only_there(route: Route) -> None:
    """A step of a solver ends on the border, which is the next group's, and is of one group."""
    with route.holding(0):
        assert route.choose(1 / 3, training=False) == 0
    assert route.choose(1 / 3, training=False) == 1
    with pytest.raises(InputError, match="group 3"), route.holding(3):
        pass
