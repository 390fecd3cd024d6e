"""What a rehearsed run would take: its peak, the moment of it, what is alive then, and which cards hold it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from lisa_kernels.errors import InputError
from lisa_kernels.methods.resting import ON_DEVICE
from lisa_kernels.plan.allocator import DeviceFullError, Reserve, replay
from lisa_kernels.plan.cards import CARDS_GB, CONTEXT_BYTES, card_bytes
from lisa_kernels.plan.trace import Trace

if TYPE_CHECKING:
    from lisa_kernels.plan.data_rows import DataRows
    from lisa_kernels.plan.duration import Duration, Machine
    from lisa_kernels.plan.flow import FlowWorkload
    from lisa_kernels.plan.gpu_memory import GpuMemory
    from lisa_kernels.plan.host import HostBytes
    from lisa_kernels.plan.length import RunLength
    from lisa_kernels.plan.ranks import Travel
    from lisa_kernels.plan.rehearsal import Workload
    from lisa_kernels.plan.streaming import StreamedBytes
    from lisa_kernels.plan.work import WorkLog


# A block keeps up to 1 MiB more than was asked for where it was cut from a larger one; which one is there depends on
# the order in which autograd gives memory back. At 7B measured peaks lie up to 0.045 % above a replay, on small models
# up to 1.2 MB.
UNEVEN, UNEVEN_BYTES = 0.0006, 2 << 20


class Moment(NamedTuple):
    """Where in a run something happens; operation and module are "" where there was none."""

    phase: str
    operation: str
    module: str


class Card(NamedTuple):
    """A card of a size that is sold: the bytes it has, and what a run leaves of them (below 0: what is missing)."""

    gb: int
    bytes: int
    margin_bytes: int
    margin_bytes_expandable: int


@dataclass(frozen=True)
class Plan:
    """The memory of one workload, by the trace of its rehearsal.

    `peak_bytes` is what its tensors, and cuBLAS's workspaces, take on the device at once, `allocated_bytes` the same
    in the blocks that hold them. A card must hold more: `reserved()`, which is what torch's CUDA allocator asks the
    device for to serve them, with and without `expandable_segments`, and `context_bytes`, an allowance for what CUDA
    itself takes. steps: of the run, where they are known.
    """

    workload: Any
    trace: Trace
    context_bytes: int = CONTEXT_BYTES
    steps: int | None = None

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once."""
        return self.trace.peak_bytes

    @property
    def allocated_bytes(self) -> int:
        """What `torch.cuda.max_memory_allocated` will say of a run on a GPU, at most."""
        return allocated_bytes(self.reserved())

    @property
    def peak(self) -> Moment:
        """The moment that needs `peak_bytes` first."""
        if not self.trace.events:
            return Moment("", "", "")
        event = self.trace.events[self.trace.peak_index]
        return Moment(event.phase, event.operation, event.module)

    @cached_property
    def split(self) -> dict[str, int]:
        """The bytes alive at the peak by category."""
        return self.trace.live_at(self.trace.peak_index)

    @cached_property
    def phases(self) -> dict[str, int]:
        """The most bytes alive at once in each phase."""
        return self.trace.phases()

    @property
    def timeline(self) -> list[int]:
        """The bytes alive after each event of the trace."""
        return self.trace.timeline()

    def reserved(self, expandable: bool = False) -> Reserve:
        """Return the peaks of torch's CUDA allocator on a device with room for any of them."""
        return self._expandable if expandable else self._fixed

    @cached_property
    def _fixed(self) -> Reserve:
        return replay(self.trace)

    @cached_property
    def _expandable(self) -> Reserve:
        return replay(self.trace, expandable=True)

    def margin_bytes(self, device_bytes: int, expandable: bool = False) -> int:
        """Return what the run leaves of a device of `device_bytes`; below 0 it does not fit, and that is missing.

        A device on which the allocator has to give cached segments back to get through is one that fits.
        """
        room = device_bytes - self.context_bytes
        reserve = self.reserved(expandable)
        if reserve.reserved > room >= reserve.allocated:
            with contextlib.suppress(DeviceFullError):
                reserve = replay(self.trace, expandable, capacity=room)
        return room - reserve.reserved

    def fits(self, device_bytes: int, expandable: bool = False) -> bool:
        """Tell whether a device of `device_bytes` in all holds the run."""
        return self.margin_bytes(device_bytes, expandable) >= 0

    def cards(self) -> list[Card]:
        """Return what the run leaves of cards of the usual sizes."""
        found = []
        for gb in CARDS_GB:
            size = card_bytes(gb)
            found.append(Card(gb, size, self.margin_bytes(size), self.margin_bytes(size, expandable=True)))
        return found

    def duration(self, machine: Machine) -> Duration:
        """Return what a step takes on a machine by its operations, see `card_by_name` and `ThisCpu`: a prediction."""
        from lisa_kernels.plan.duration import predict

        work = self._cpu_work if machine.is_cpu else self._gpu_work
        return predict(work, self.workload, machine, self.workload.steps_between())

    @cached_property
    def host(self) -> HostBytes | None:
        """What masters of weights at rest take beside the device; None where there are none."""
        from lisa_kernels.plan.host import host_bytes
        from lisa_kernels.plan.rehearsal import Workload

        return host_bytes(self.workload, self.steps) if isinstance(self.workload, Workload) else None

    @property
    def streamed(self) -> StreamedBytes | None:
        """What of its weights a run has on the host or in a file and streams from there; None where it has none."""
        from lisa_kernels.plan.duration import streamed_bytes

        if getattr(self.workload, "resting_where", None) in (None, ON_DEVICE):
            return None
        return streamed_bytes(self._gpu_work, self.workload)

    @property
    def travel(self) -> Travel | None:
        """What the ranks of the run send each other; None of a single one."""
        return None if getattr(self.workload, "ranks", 1) == 1 else self._gpu_work.travel

    @cached_property
    def _gpu_work(self) -> WorkLog:
        from lisa_kernels.plan.gpu_memory import GpuMemory

        return self._worked(GpuMemory.here())

    @cached_property
    def _cpu_work(self) -> WorkLog:
        return self._worked(None)

    def _worked(self, gpu: GpuMemory | None) -> WorkLog:
        from lisa_kernels.plan.rehearsal import Workload, rehearse
        from lisa_kernels.plan.work import WorkLog

        if not isinstance(self.workload, Workload):
            raise InputError("the time of a flow's steps is not predicted; take a few of them and look at their time.")
        work = WorkLog()
        rehearse(self.workload, gpu=gpu, work=work)
        return work

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the events as plain values, for JSON."""
        return {
            **_plain(self.workload), "peak_bytes": self.peak_bytes, "allocated_bytes": self.allocated_bytes,
            "peak": self.peak._asdict(), "split_bytes": self.split, "phase_peak_bytes": self.phases,
            "reserved_bytes": self.reserved().reserved, "reserved_bytes_expandable": self.reserved(True).reserved,
            "context_bytes": self.context_bytes, "cards": [card._asdict() for card in self.cards()],
            "host": None if self.host is None else self.host.as_dict(),
            "streamed": None if self.streamed is None else self.streamed.as_dict(),
            "travel": None if self.travel is None else self.travel.as_dict(),
        }  # fmt: skip


def allocated_bytes(reserve: Reserve) -> int:
    """Return a run's peak in blocks by that of its replay, with room for blocks that came out larger than there."""
    return reserve.allocated + max(math.ceil(reserve.allocated * UNEVEN), UNEVEN_BYTES)


def _plain(workload: Workload | FlowWorkload) -> dict[str, Any]:
    values = {field.name: getattr(workload, field.name) for field in dataclasses.fields(workload)}
    length: RunLength | None = values.pop("length", None)
    settings = (workload.method if length is None else length.applied_to(workload.method)).settings()
    if length is not None and length.steps is None:
        settings["period"] = "auto"
    data: DataRows | None = values.pop("data", None)
    told = {} if data is None else {"data_rows": data.as_dict(values["seq_len"])}
    named = isinstance(workload.model, (str, os.PathLike))
    model = str(workload.model) if named else type(workload.model).__name__
    return {**values, **told, "model": model, "method": settings}
