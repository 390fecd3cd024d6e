"""What several ranks send each other in the steps of a run, by its rehearsal, and how long links take for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lisa_kernels.basis.range_finder import FIRST_PASSES
from lisa_kernels.distributed import Ranks
from lisa_kernels.distributed.digests import digest
from lisa_kernels.methods import SampledAdamW
from lisa_kernels.plan.links import LINKS, Link
from lisa_kernels.plan.machines import Seconds
from lisa_kernels.plan.shards import GATHERS, SCATTERS

GRADIENTS, SKETCHES = "averages the gradients", "finds the basis of"
# Before what a tensor of rank 0's is taken for.
TAKEN = "takes rank 0's, which "
# Rehearsed steps: one in which all bases are found, and one that has them.
FIRST_STEP, STEADY_STEP = "step 1", "step 2"


class RehearsedRanks(Ranks):
    """Stands for `Ranks` in a rehearsal: counts what would travel, and makes the same tensors on its way.

    phase: tells what is going on.
    """

    def __init__(self, count: int, phase: Callable[[], str], mixed: bool = False) -> None:
        self.rank, self.count, self.mixed = 0, count, mixed
        self._phase, self._occasion = phase, ""
        # Bytes and sums of each (step, occasion).
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.sums: Counter[tuple[str, str]] = Counter()

    def meet(self, occasion: str) -> None:
        """Note what the next tensors travel for."""
        self._occasion = occasion

    def any_has(self, flags: list[bool]) -> list[bool]:
        """Return what this rank has: all do the same."""
        return flags

    def sum_(self, tensor: Tensor) -> Tensor:
        """Count a tensor that would be added up."""
        key = self._phase().partition(":")[0], self._occasion.partition(" in step")[0]
        self.bytes[key] += tensor.numel() * tensor.element_size()
        self.sums[key] += 1
        return tensor

    def take_first_(self, tensor: Tensor) -> Tensor:
        """Count a tensor that would come from rank 0."""
        key = self._phase().partition(":")[0], TAKEN + self._occasion.partition(" in step")[0]
        self.bytes[key] += tensor.numel() * tensor.element_size()
        self.sums[key] += 1
        return tensor

    def count_sent(self, what: str, size: int) -> None:
        """Count bytes of all ranks together that would be gathered, or scattered as sums."""
        key = self._phase().partition(":")[0], what
        self.bytes[key] += size
        self.sums[key] += 1

    def check_equal(self, tensors: Mapping[str, Tensor], when: str) -> None:
        """Make what comparing digests makes."""
        for tensor in tensors.values():
            digest(tensor)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do nothing: a rehearsal that fails does so alone."""
        yield

    def close(self) -> None:
        """Do nothing."""

    def of(self, step: str, kind: str) -> tuple[int, int]:
        """Return the (bytes, sums) of a kind in a rehearsed step."""
        keys = [key for key in self.bytes if key[0] == step and f"{key[1]} of step".startswith(f"{kind} of step")]
        return sum(self.bytes[key] for key in keys), sum(self.sums[key] for key in keys)


@dataclass(frozen=True)
class Travel:
    """The bytes that are summed over the ranks: what each of them gives, and gets as much of.

    gradients: of every step. first_bases: of a step that finds the bases of all layers that a switch brings; lasting:
    of the first bases of what always trains. sketches: what finding and refreshing bases comes to a step, on average
    over the periods of a long run, if every switch brings other layers. broadcast: of finished bases, from rank 0 to
    the others where cards are mixed, and how they are turned; on average too. Of weights that ranks share out, gathered
    and scattered: those that forwards and backwards of a step gather, and the gradients of which each rank gets the sum
    of its part; bytes of all ranks together, in so many `shard_sends`. Words of a few bytes a parameter come on top.
    """

    ranks: int
    gradients: int
    first_bases: int
    lasting: int
    sketches: float
    gradient_sums: int
    sketch_sums: float
    broadcast: float = 0.0
    gathered: float = 0.0
    scattered: float = 0.0
    shard_sends: float = 0.0

    @property
    def bytes_a_step(self) -> float:
        """All of it, of a step on average."""
        return self.gradients + self.sketches + self.broadcast + self.gathered + self.scattered

    def seconds(self, link: Link) -> Seconds:
        """Return what a step's share of it takes on a link, on which all of it is waited for."""
        # A ring passes each byte on to all others but one, twice; the ranks tell each other what for before each sum.
        shards = self.gathered + self.scattered
        # And of what is gathered or scattered once.
        sent = (2 * (self.bytes_a_step - shards) + shards) * (self.ranks - 1) / self.ranks
        meetings = (self.ranks - 1) * (4 * (self.gradient_sums + self.sketch_sums) + self.shard_sends)
        return link.seconds(sent, meetings)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        links = [
            {
                "link": link.name, "bandwidth_gb_s": link.bandwidth_gb_s,
                "step_seconds_low": self.seconds(link).low, "step_seconds_high": self.seconds(link).high,
                "hidden_share": HIDDEN,
            }
            for link in LINKS
        ]  # fmt: skip
        return {
            "ranks": self.ranks, "gradient_bytes_per_step": self.gradients, "sketch_bytes_per_step": self.sketches,
            "sketch_bytes_of_a_switch": self.first_bases, "basis_bytes_per_step": self.broadcast,
            "gathered_bytes_per_step": self.gathered, "scattered_bytes_per_step": self.scattered, "links": links,
        }  # fmt: skip


# Of what travels, beside the backward: gradients leave when it has ended, and a basis is waited for.
HIDDEN = 0.0


def travel_of(ranks: RehearsedRanks, optimizer: SampledAdamW, period: int | None, repeats: float = 1.0) -> Travel:
    """Return what travels in a run of which this is the rehearsal; period: steps between switches, None of none.

    repeats: how many micro-batches of a step each that was rehearsed stands for.
    """
    gradients, sums = ranks.of(STEADY_STEP, GRADIENTS)
    always = {} if period is None else optimizer.layout.always.lowrank
    drawn_first = lasting = 0
    sketches = often = broadcast = 0.0
    for path, layer in optimizer._layers().items():
        each, times = ranks.of(FIRST_STEP, f"{SKETCHES} {path}")
        taken, _ = ranks.of(FIRST_STEP, f"{TAKEN}{SKETCHES} {path}")
        if not each or layer.tracker is None:
            continue
        gap, offset = layer.tracker.gap, layer.tracker.offset
        if period is None or path in always:
            lasting += each
            first, refreshes = 0.0, 1 / gap if gap else 0.0
        else:
            drawn_first += each
            first, refreshes = 1 / period, _refreshes(period, gap, offset) / period
        passes = first + refreshes / FIRST_PASSES
        sketches += passes * each
        often += passes * times
        # A refreshed one comes with its turn from the one before, float32 [r, r].
        broadcast += (first * taken + refreshes * (taken + 4 * layer.rank**2)) if taken else 0.0
    gathered, gathers = ranks.of(STEADY_STEP, GATHERS)
    scattered, scatters = ranks.of(STEADY_STEP, SCATTERS)
    return Travel(
        ranks.count, gradients, drawn_first, lasting, sketches, sums, often, broadcast, gathered * repeats, scattered,
        gathers * repeats + scatters,
    )  # fmt: skip


def _refreshes(period: int, gap: int, offset: int) -> int:
    """Return how often one matrix's basis is refreshed in a period that has begun with its first one."""
    return sum((step + offset) % gap == 0 for step in range(1, period)) if gap else 0
