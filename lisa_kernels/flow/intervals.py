"""The intervals of time that groups of layers are experts for, and times drawn inside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.ops.random_bits import number_key, random_words

KINDS = ("uniform", "logit-normal")
PLACEMENTS = ("quantile", "uniform")
# How far beyond [0, 1] a solver's sum of steps may end by rounding.
OVERSHOOT = 1e-5
# Beyond the indices that parameters and the rows of bases use.
TIMES_STREAM = 3 << 32
_NORMAL = NormalDist()


def _number(name: str, value: object, above: float, below: float = math.inf) -> float:
    """Return a finite number between two others, both excluded."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not above < value < below:
        raise InputError(f"{name} is {value!r}; a finite number above {above:g} is wanted.")
    return float(value)


@dataclass(frozen=True)
class Times:
    """How times are distributed in training: uniformly, or as the logistic function of a normal number.

    mean, std: of that number. shift: as for images of more pixels, the noise level s = 1 − t becomes
    shift·s / (1 + (shift − 1)·s); 1 leaves times as they are, more moves them towards noise.
    """

    kind: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        """Check kind and numbers."""
        if self.kind not in KINDS:
            raise unknown_name("distribution of times", str(self.kind), KINDS)
        _number("the mean of times", self.mean, -math.inf)
        _number("the std of times", self.std, 0.0)
        _number("the shift of times", self.shift, 0.0)

    def cumulative(self, t: float) -> float:
        """Return the probability of a time below t, in [0, 1]."""
        if not 0.0 < t < 1.0:
            return float(t >= 1.0)
        t = t * self.shift / (1.0 + (self.shift - 1.0) * t)
        if self.kind == "uniform":
            return t
        # A large shift may round to an end.
        return _NORMAL.cdf((math.log(t / (1.0 - t)) - self.mean) / self.std) if 0.0 < t < 1.0 else float(t >= 1.0)

    def quantiles(self, shares: Tensor) -> Tensor:
        """Return the times below which are these shares of all, float64 in [0, 1] of the same shape."""
        t = shares.to(torch.float64)
        if self.kind == "logit-normal":
            t = torch.sigmoid(torch.special.ndtri(t) * self.std + self.mean)
        return t / (self.shift - (self.shift - 1.0) * t)


@dataclass(frozen=True)
class Intervals:
    """The part of time that each group is for: group k has [bounds[k], bounds[k + 1]), the last its end too.

    times: the distribution that training draws from. overlap: by which share of its own length each interval is widened
    on both sides in training, so that neighbours agree at the border; where a time belongs is not changed by it.
    Raises InputError unless bounds rise from 0 to 1.
    """

    bounds: tuple[float, ...]
    times: Times = field(default_factory=Times)
    overlap: float = 0.0

    def __post_init__(self) -> None:
        """Check the bounds."""
        rising = [_number("a boundary", bound, -math.inf) for bound in self.bounds]
        ends = (rising[0], rising[-1]) if len(rising) > 1 else ()
        if ends != (0.0, 1.0) or any(not low < high for low, high in pairwise(rising)):
            raise InputError(f"the boundaries are {list(self.bounds)}; numbers that rise from 0 to 1 are wanted.")
        if _number("overlap", self.overlap, -1.0) < 0.0:
            raise InputError(f"overlap is {self.overlap!r}; a share of an interval, at least 0, is wanted.")
        object.__setattr__(self, "bounds", tuple(rising))

    @classmethod
    def make(
        cls, groups: int, boundaries: str | Sequence[float] = "quantile", times: str | Times = "uniform",
        overlap: float = 0.0,
    ) -> Intervals:  # fmt: skip
        """Return the intervals of `groups` groups.

        boundaries: "quantile", each with an equal share of the times that training draws; "uniform", of equal length;
        or the groups + 1 boundaries themselves, from 0 to 1.
        """
        if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
            raise InputError(f"groups is {groups!r}; a whole number of at least 1 is wanted.")
        drawn = times if isinstance(times, Times) else Times(times)
        if not isinstance(boundaries, str):
            if len(boundaries) != groups + 1:
                raise InputError(
                    f"{len(boundaries)} boundaries were given for {groups} groups; {groups + 1} are wanted, "
                    "from 0 to 1."
                )
            return cls(tuple(boundaries), drawn, overlap)
        if boundaries not in PLACEMENTS:
            raise unknown_name("placement of boundaries", boundaries, PLACEMENTS)
        shares = torch.arange(1, groups, dtype=torch.float64, device="cpu") / groups
        inner = drawn.quantiles(shares) if boundaries == "quantile" else shares
        return cls((0.0, *inner.tolist(), 1.0), drawn, overlap)

    @property
    def groups(self) -> int:
        """How many intervals there are."""
        return len(self.bounds) - 1

    def interval(self, group: int) -> tuple[float, float]:
        """Return where group k's part of time begins and ends."""
        self._check_group(group)
        return self.bounds[group], self.bounds[group + 1]

    def training_interval(self, group: int) -> tuple[float, float]:
        """Return the same, widened by the overlap and cut at 0 and 1."""
        low, high = self.interval(group)
        wider = self.overlap * (high - low)
        return max(0.0, low - wider), min(1.0, high + wider)

    def groups_of(self, t: Tensor) -> Tensor:
        """Return the group of each time, int64 of the same shape, on its device.

        A time beyond 0 or 1 by no more than rounding belongs to the first or last group. Raises InputError for others.
        """
        values = t.detach().to(torch.float64)
        margin = max(OVERSHOOT, 2 * torch.finfo(t.dtype).eps) if t.is_floating_point() else OVERSHOOT
        if values.numel() and not bool(((values >= -margin) & (values <= 1.0 + margin)).all()):
            wrong = values[~((values >= -margin) & (values <= 1.0 + margin))].flatten()[0]
            raise InputError(
                f"a time is {float(wrong):g}; times from 0 (noise) to 1 (data) are wanted: a model of another "
                "convention needs its times converted."
            )
        # Compared as the time's own precision holds the bounds, so that a time that is a bound begins its interval.
        inner = torch.tensor(self.bounds[1:-1], dtype=torch.float64, device=t.device)
        if t.is_floating_point():
            inner = inner.to(t.dtype).to(torch.float64)
        return torch.bucketize(values, inner, right=True)

    def group_of(self, t: float | Tensor) -> int:
        """Return the group of a time, or of several that belong to one group; InputError where they do not."""
        times = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64, device="cpu")
        found = self.groups_of(times).unique().tolist()
        if len(found) == 1:
            return int(found[0])
        if not found:
            raise InputError("no time was given; one is wanted for each image of a batch.")
        raise InputError(
            f"the times of this batch belong to the groups {', '.join(map(str, found))}, and a forward runs the layers "
            "of one; split the batch by group, or give all images one time."
        )

    def draw(self, group: int, count: int, *, seed: int, step: int, call: int = 0) -> Tensor:
        """Return float32 [count] on the CPU: times of group k's training interval, as `times` distributes them there.

        They depend on these numbers alone; call: of several draws in one step, which.
        """
        low, high = self.training_interval(group)
        first, last = self.times.cumulative(low), self.times.cumulative(high)
        key = torch.tensor(number_key(seed, TIMES_STREAM + call, step), dtype=torch.int64, device="cpu")
        shares = (random_words(key, 0, count).to(torch.float64) + 0.5) / 2.0**32
        drawn = self.times.quantiles(first + (last - first) * shares).to(torch.float32)
        return _inside(drawn, low, high)

    def state(self) -> dict[str, Any]:
        """Return plain values from which `from_state` makes the same intervals."""
        return {"bounds": list(self.bounds), "times": asdict(self.times), "overlap": self.overlap}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Intervals:
        """Return the intervals that `state` described."""
        return cls(tuple(state["bounds"]), Times(**state["times"]), state["overlap"])

    def _check_group(self, group: int) -> None:
        if not 0 <= group < self.groups:
            raise InputError(f"group {group} was asked for; there are groups 0 to {self.groups - 1}.")


def _inside(drawn: Tensor, low: float, high: float) -> Tensor:
    """Return times with those that rounding put outside of [low, high) moved to its nearest number of float32."""
    ends = torch.tensor([low, high, 2.0, -1.0], dtype=torch.float64, device=drawn.device)
    least, most, above, below = ends.to(torch.float32).unbind()
    if float(least) < low:
        least = torch.nextafter(least, above)
    if float(most) >= high:
        most = torch.nextafter(most, below)
    return drawn.clamp(least, most)
