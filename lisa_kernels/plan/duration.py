"""How long a step takes, by the operations of its rehearsal and what a machine does with each: a prediction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lisa_kernels.plan.machines import DISK, DISKS, LIMITS, LINK, Seconds, disk_seconds
from lisa_kernels.plan.work import PARTS, Operation, WorkLog

if TYPE_CHECKING:
    from lisa_kernels.plan.rehearsal import Workload
    from lisa_kernels.plan.streaming import StreamedBytes

NOTHING = Seconds(0.0, 0.0)
# Of a rehearsal a step that has everything, and one after a switch, which finds bases.
STEADY, SWITCHED = "step 2:", "step 3:"
# Part of a step: what copies of streamed weights take longer than the work beside them.
WAITS = "waiting for weights"


class Machine(Protocol):
    """What a prediction asks of a card, or of the CPU it runs on."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def is_cpu(self) -> bool:
        """Whether it is the CPU that the plan is made on."""

    def seconds(self, operation: Operation) -> tuple[Seconds, str]:
        """Return what an operation takes, and what bounds it."""

    def host_seconds(self, launches: int) -> Seconds:
        """Return what starting so many operations takes, beside which the device works."""

    def copy_seconds(self, nbytes: float) -> Seconds:
        """Return what so many bytes take from the host to the device, beside its work."""


@dataclass(frozen=True)
class Duration:
    """What a step takes on one machine, on average over the steps of a period; every figure a prediction.

    parts: seconds of forward, recomputation, backward, optimizer and switch, and of waits for streamed weights. bounds:
    shares of the step that matrix products, bandwidth and launches take, by what bounds each operation. launches,
    products (additions counted too) and bytes (read and written): of a step that does not switch.
    """

    machine: str
    tokens: int
    launches: int
    products: int
    bytes: int
    parts: Mapping[str, Seconds] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)

    @property
    def step(self) -> Seconds:
        """Seconds of one optimizer step."""
        return Seconds(sum(part.low for part in self.parts.values()), sum(part.high for part in self.parts.values()))

    @property
    def bound_by(self) -> str:
        """What takes most of the step."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        step = self.step
        return {
            "machine": self.machine, "step_seconds_low": step.low, "step_seconds_high": step.high,
            "tokens_per_second_low": self.tokens / step.high, "tokens_per_second_high": self.tokens / step.low,
            "bound_by": self.bound_by, "bounds": dict(self.bounds), "launches": self.launches,
            "step_products": self.products, "step_bytes": self.bytes,
            "parts": {name: list(seconds) for name, seconds in self.parts.items()},
        }  # fmt: skip


def predict(work: WorkLog, workload: Workload, machine: Machine, period: int | None) -> Duration:
    """Return what a step of the rehearsed workload takes on a machine, what a switch adds spread over its period.

    period: steps between switches; None: there are none.
    """
    micro_batches = workload.accumulate / min(workload.accumulate, 2)
    steady, extra = _step(work, STEADY), Counter[tuple[str, Any]]()
    # The step that is steady until then ends with the switch.
    switch = Counter({key: steady.pop(key) for key in [*steady] if key[0] == "switch"})
    if period is not None:
        switched = _step(work, SWITCHED)
        extra = Counter({key: switched[key] + switch[key] - steady[key] for key in {*switched, *switch, *steady}})
    totals: dict[tuple[str, Any], float] = {}
    always: dict[tuple[str, Any], float] = {}
    for key in {*steady, *extra}:
        repeated = micro_batches if key[0] in ("forward", "recomputation", "backward") else 1.0
        always[key] = steady[key] * repeated
        totals[key] = always[key] + extra[key] / (period or 1) * repeated
    return _on(machine, work, totals, always, workload)


def streamed_bytes(work: WorkLog, workload: Workload) -> StreamedBytes | None:
    """Return what of a rehearsed run's weights is streamed, and what crosses over in a step within a period."""
    return (
        None if work.turns is None else work.turns.streamed(STEADY, workload.accumulate / min(workload.accumulate, 2))
    )


def _step(work: WorkLog, step: str) -> Counter[tuple[str, Any]]:
    found: Counter[tuple[str, Any]] = Counter()
    for part, counts in work.of_phases(lambda phase: phase.startswith(step)).items():
        found.update({(part, key): count for key, count in counts.items()})
    return found


def _on(
    machine: Machine, work: WorkLog, totals: Mapping[tuple[str, Any], float],
    always: Mapping[tuple[str, Any], float], workload: Workload,
) -> Duration:  # fmt: skip
    parts, shares = dict.fromkeys(PARTS, NOTHING), dict.fromkeys(LIMITS, 0.0)
    started = dict.fromkeys(PARTS, 0.0)
    for (part, key), count in totals.items():
        operation = work.operations[key]
        assert operation is not None
        seconds, bound = machine.seconds(operation)
        parts[part] += seconds.times(count)
        shares[bound] += count * sum(seconds) / 2
        started[part] += count
    for part, count in started.items():
        # The host goes ahead of the device and is waited for where it is slower.
        host = machine.host_seconds(round(count))
        behind = Seconds(max(0.0, host.low - parts[part].low), max(0.0, host.high - parts[part].high))
        parts[part] += behind
        shares["launches"] += sum(behind) / 2
    streamed = streamed_bytes(work, workload)
    waits = _waits(machine, parts, streamed)
    if streamed is not None and waits.high > 0:
        parts[WAITS], shares[DISK if streamed.file_bytes else LINK] = waits, sum(waits) / 2
    whole = sum(shares.values()) or 1.0
    tokens = sum(map(sum, workload.rows(typical=True))) * workload.accumulate
    counted = [(work.operations[key], count) for (_, key), count in always.items()]
    launches, products, moved = (
        round(sum(of(operation) * count for operation, count in counted if operation is not None))
        for of in (lambda _: 1, lambda operation: operation.products, lambda operation: operation.bytes)
    )
    return Duration(
        machine.name, tokens, launches, products, moved,
        {name: seconds for name, seconds in parts.items() if seconds.high > 0},
        {name: share / whole for name, share in shares.items()},
    )  # fmt: skip


def _waits(machine: Machine, parts: Mapping[str, Seconds], streamed: StreamedBytes | None) -> Seconds:
    """Return how much longer than the work beside them the copies of streamed weights take, forward and backward.

    On a CPU they are work themselves. From a file they take what the fastest of the known disks does, or the slowest.
    """
    waits = NOTHING
    if streamed is not None:
        for copied, beside in (("forward", ("forward",)), ("backward", ("recomputation", "backward"))):
            nbytes = streamed.step_bytes.get(copied, 0)
            copies = machine.copy_seconds(nbytes)
            if streamed.file_bytes:
                disks = [disk_seconds(nbytes, rate) for rate in DISKS.values()]
                low, high = min(disk.low for disk in disks), max(disk.high for disk in disks)
                copies = Seconds(max(copies.low, low), max(copies.high, high))
            work = NOTHING if machine.is_cpu else sum((parts[part] for part in beside), NOTHING)
            waits += Seconds(max(0.0, copies.low - work.low), max(0.0, copies.high - work.high))
    return waits
