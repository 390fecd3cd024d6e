"""Which blocks of a model run: those of the group that trains, or of the group that a time belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.flow.intervals import Intervals

# How far a time that was computed with may be outside of the interval it was drawn in, beside its own precision.
ROUNDING = 1e-6


class Route:
    """A stack of `layers` blocks in contiguous groups of equal size, one for each interval, in the order of time.

    active: the group that trains, set by who trains the model; while a model trains it runs that one. None, as in
    evaluation, runs the group that the times belong to. Raises InputError where groups do not divide the layers.
    """

    def __init__(self, layers: int, intervals: Intervals) -> None:
        if layers < 1 or layers % intervals.groups:
            raise InputError(
                f"{layers} layers do not divide into {intervals.groups} groups of equal size; use a number of groups "
                "that divides them."
            )
        self.layers, self.intervals = layers, intervals
        self.active: int | None = None
        self._held: int | None = None

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return self.intervals.groups

    @property
    def size(self) -> int:
        """How many blocks a group has."""
        return self.layers // self.groups

    @property
    def held(self) -> int | None:
        """The group that runs whatever the times are; None outside of `holding`."""
        return self._held

    def blocks_of(self, group: int) -> range:
        """Return the numbers of a group's blocks."""
        self.intervals.interval(group)
        return range(group * self.size, (group + 1) * self.size)

    def group_of_block(self, block: int) -> int:
        """Return the group that a block is in."""
        if not 0 <= block < self.layers:
            raise InputError(f"block {block} was asked for; there are blocks 0 to {self.layers - 1}.")
        return block // self.size

    @contextmanager
    def holding(self, group: int) -> Iterator[None]:
        """Run this group whatever the times are, as within one step of a solver; nothing then waits for the device."""
        self.intervals.interval(group)
        before, self._held = self._held, group
        try:
            yield
        finally:
            self._held = before

    def choose(self, t: float | Tensor, training: bool, coarseness: float = 0.0) -> int:
        """Return the group to run for these times: one for the whole batch, or one each.

        coarseness: how far they may be from what was drawn, for models whose time has whole steps. Raises InputError
        where they belong to several groups, and in training where they are not the active group's (looked at on the CPU
        only: of times on another device nothing is read while a group is active).
        """
        if self._held is not None:
            return self._held
        if not training or self.active is None:
            return self.intervals.group_of(t)
        self._check_active(self.active, t, coarseness)
        return self.active

    def split(self, t: Tensor) -> list[tuple[int, Tensor]]:
        """Return the groups that times [batch] belong to, each with its places in the batch, int64."""
        groups = self.intervals.groups_of(t)
        return [(int(group), torch.nonzero(groups == group).flatten()) for group in groups.unique().tolist()]

    def _check_active(self, group: int, t: float | Tensor, coarseness: float) -> None:
        if isinstance(t, Tensor) and (t.device.type != "cpu" or not t.numel()):
            return
        low, high = self.intervals.training_interval(group)
        least, most = (float(t.min()), float(t.max())) if isinstance(t, Tensor) else (float(t), float(t))
        narrow = isinstance(t, Tensor) and t.is_floating_point()
        margin = max(coarseness + ROUNDING, torch.finfo(t.dtype).eps if narrow else 0.0)  # type: ignore[union-attr]
        if not (low - margin <= least and most <= high + margin):
            raise InputError(
                f"the times of this batch are from {least:g} to {most:g}, and group {group}, which trains now, is for "
                f"{low:g} to {high:g}; draw them with the optimizer's times(batch_size)."
            )
