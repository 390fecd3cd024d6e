"""The method: layers in groups, each the expert for an interval of time, that train in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from lisa_kernels.errors import InputError
from lisa_kernels.flow.experts_adamw import ExpertsAdamW
from lisa_kernels.flow.intervals import Intervals, Times
from lisa_kernels.flow.routing import Clock
from lisa_kernels.methods import Method
from lisa_kernels.samplers import CyclicSampler, Sampler


@dataclass(frozen=True)
class TimestepExperts(Method):
    """Contiguous groups of blocks, each trained at full rank on its interval of time while the others rest.

    Source: LaTtE-Flow, arXiv 2506.06952, which leaves open whether a step trains one group or all; boundaries of equal
    probability and the overlap are those of DiffusionBlocks. Groups take turns of `period` steps, the noisiest first.
    boundaries: "quantile", "uniform" or the groups + 1 numbers, see `Intervals.make`. times: "uniform", "logit-normal"
    or `Times(...)`. overlap: the share of its length by which an interval is widened in training, on both sides.
    resting_weights: "page" keeps the weights of resting groups in the store of paged state too. shared_rate: times lr,
    the rate of all that is no one block's, which steps each time. clock: how the model is told the time.
    Needs a forward that goes through a list of blocks and is given the time.
    """

    name: ClassVar[str] = "timestep-experts"
    around: ClassVar[str] = "all"
    optimizer: ClassVar[type | None] = ExpertsAdamW
    groups: int = 4
    period: int = 1
    boundaries: str | tuple[float, ...] = "quantile"
    times: str | Times = "uniform"
    overlap: float = 0.05
    retired_state: str = "page"
    resting_weights: str = "keep"
    shared_rate: float = 1.0
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        """Check the settings, with the intervals that they make."""
        super().__post_init__()
        if isinstance(self.boundaries, Sequence) and not isinstance(self.boundaries, str):
            object.__setattr__(self, "boundaries", tuple(self.boundaries))
        if not isinstance(self.shared_rate, (int, float)) or not 0.0 <= self.shared_rate < float("inf"):
            raise InputError(f"shared_rate is {self.shared_rate!r}; a finite number of at least 0 is wanted.")
        if not isinstance(self.clock, Clock):
            raise InputError(f'clock is {self.clock!r}; one such as Clock("timestep", noise=1000, data=0) is wanted.')
        self.intervals()
        if self.retired_state == "drop" and self.period == 1 and self.groups > 1:
            raise InputError(
                'retired_state="drop" forgets a group\'s moments at each switch, and with period=1 every step is one, '
                'so that Adam would never have any; use retired_state="page" or "keep", or a long period.'
            )

    def intervals(self) -> Intervals:
        """Return the intervals of the groups."""
        return Intervals.make(self.groups, self.boundaries, self.times, self.overlap)

    def make_sampler(self, layers: int, seed: int, scores: Sequence[float] | None) -> Sampler | None:
        """Return a sampler that draws the groups in turn, each as its blocks."""
        if layers % self.groups:
            raise InputError(
                f"the model's {layers} layers do not divide into {self.groups} groups of equal size; use a number of "
                "groups that divides them."
            )
        return CyclicSampler(layers, layers // self.groups, seed, order="ascending")
