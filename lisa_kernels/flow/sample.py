"""Images from noise: the flow is followed from t = 0 to t = 1 by Euler's or Heun's steps.

A step never mixes groups: steps end at the boundaries between intervals, and Heun's second evaluation at a boundary is
the step's own group's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.flow.intervals import Intervals
from lisa_kernels.flow.path import VelocityModel

SOLVERS = ("euler", "heun")


class Routed(Protocol):
    """What says which group runs; `Route` does."""

    @property
    def intervals(self) -> Intervals:
        """The intervals of the groups."""

    def holding(self, group: int) -> AbstractContextManager[None]:
        """Run this group meanwhile."""


def time_grid(intervals: Intervals, steps: int) -> list[tuple[int, list[float]]]:
    """Return for each group, noisiest first, the times at which its steps begin and end.

    The steps are shared out by the intervals' lengths, at least one for each, and are of one length within a group.
    Raises InputError for fewer steps than groups.
    """
    groups = intervals.groups
    if steps < groups:
        raise InputError(
            f"{steps} steps were asked of {groups} groups, and no step mixes groups; at least {groups} are wanted."
        )
    lengths = [high - low for low, high in pairwise(intervals.bounds)]
    counts = _shared_out(lengths, steps)
    return [
        (group, [low + (high - low) * step / count for step in range(count)] + [high])
        for group, ((low, high), count) in enumerate(zip(pairwise(intervals.bounds), counts))
    ]


def _shared_out(lengths: list[float], steps: int) -> list[int]:
    """Return whole numbers of at least 1 that add up to `steps`, each as near to its share as the others allow."""
    counts = [max(1, int(length * steps + 1e-9)) for length in lengths]
    while sum(counts) != steps:
        more = sum(counts) < steps
        owed = [length * steps - count for length, count in zip(lengths, counts)]
        change = max(range(len(counts)), key=lambda i: owed[i]) if more else min(
            (i for i in range(len(counts)) if counts[i] > 1), key=lambda i: owed[i]
        )  # fmt: skip
        counts[change] += 1 if more else -1
    return counts


def guided(model: VelocityModel, strength: float, anything: Any) -> VelocityModel:
    """Return the model with classifier-free guidance: v(any) + strength · (v(condition) − v(any)), in one batch of two.

    anything: the condition that says nothing, for each image of a batch. A strength of 1 asks the model once.
    """
    if strength == 1:
        return model

    def velocity(x: Tensor, times: Tensor, condition: Any) -> Tensor:
        both = model(torch.cat([x, x]), torch.cat([times, times]), _joined(condition, anything))
        wanted, free = both.chunk(2)
        return free + strength * (wanted - free)

    return velocity


def _joined(condition: Any, anything: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.cat([condition, anything])
    return condition.joined(anything)


@torch.no_grad()
def sample(
    model: VelocityModel, route: Routed, noise: Tensor, condition: Any = None, *, steps: int = 40,
    solver: str = "euler", progress: Callable[[], None] | None = None,
) -> Tensor:  # fmt: skip
    """Return images: noise [batch, ...] moved along the model's velocity from t = 0 to t = 1.

    model: in evaluation; of its layers each step runs only the group that its interval has. progress: called after
    each step. Raises InputError for an unknown solver and for fewer steps than groups.
    """
    if solver not in SOLVERS:
        raise unknown_name("solver", solver, SOLVERS)
    x = noise
    for group, begin, end in _steps(route.intervals, steps):
        with route.holding(group):
            x = _step(model, x, begin, end, condition, solver)
        if progress is not None:
            progress()
    return x


def _steps(intervals: Intervals, steps: int) -> Iterator[tuple[int, float, float]]:
    for group, times in time_grid(intervals, steps):
        for begin, end in pairwise(times):
            yield group, begin, end


def _step(model: VelocityModel, x: Tensor, begin: float, end: float, condition: Any, solver: str) -> Tensor:
    velocity = model(x, _times(x, begin), condition)
    ahead = x + (end - begin) * velocity
    if solver == "euler":
        return ahead
    return x + (end - begin) / 2 * (velocity + model(ahead, _times(x, end), condition))


def _times(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, device=x.device, dtype=torch.float32)
