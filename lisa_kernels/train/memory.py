"""The memory that a run takes, measured, beside what was planned for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from mmap import PAGESIZE
from pathlib import Path

import torch
from rich.console import Console

from lisa_kernels.errors import NotRehearsedError
from lisa_kernels.train.options import FineTuneOptions

# Above this a plan did not keep its promise.
TOLERANCE = 0.05
_PAGES, _STATUS = Path("/proc/self/statm"), Path("/proc/self/status")
_CLEAR_REFS, _RESET_PEAK = Path("/proc/self/clear_refs"), "5"


@dataclass(frozen=True)
class MemoryMeter:
    """The peak since it was started, beyond what was there then.

    On a GPU, of what torch allocates on it; on a CPU, of the process's resident size, which is more than tensors.
    """

    device: torch.device
    before: int

    @property
    def gpu(self) -> bool:
        """Whether a GPU's memory is measured."""
        return self.device.type == "cuda"

    @classmethod
    def start(cls, device: torch.device) -> MemoryMeter:
        """Return a meter of what a run on `device` takes, which measures from now on."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return cls(device, torch.cuda.memory_allocated(device))
        return cls(device, _resident_bytes() if _reset_peak() else _peak_resident_bytes())

    def peak_bytes(self) -> int:
        """Return the peak so far."""
        peak = torch.cuda.max_memory_allocated(self.device) if self.gpu else _peak_resident_bytes()
        return max(0, peak - self.before)

    def describe(self, planned: int | None) -> str:
        """Return the peak as text, beside the planned one if there is one, and what each of them counts."""
        peak = self.peak_bytes()
        if self.gpu:
            text = f"peak memory {peak / 1e9:.2f} GB"
            return text if planned is None else f"{text}, {planned / 1e9:.2f} GB planned ({peak / planned - 1:+.1%})"
        text = f"peak memory: the process grew by {peak / 1e9:.2f} GB"
        if planned is None:
            return text
        return (
            f"{text} (libraries and buffers count, memory that it had freed before does not); the plan's "
            f"{planned / 1e9:.2f} GB count tensors alone"
        )

    def warning(self, planned: int | None) -> str | None:
        """Return what to say where a GPU's tensors took more than 5 % above what was planned, else None.

        planned: in blocks of torch's allocator, which is what is measured. What a process grows by on a CPU is another
        number, which no plan speaks of.
        """
        peak = self.peak_bytes()
        if not self.gpu or planned is None or peak <= planned * (1 + TOLERANCE):
            return None
        return (
            f"the run took {(peak - planned) / 1e9:.2f} GB more than was planned (a plan knows nothing of evaluation, "
            "of buffers inside of kernels, and of other programs' tensors)"
        )


def describe_held(measured: Mapping[str, int], planned: Mapping[str, int]) -> str | None:
    """Return what model and optimizer held before a step beside its plan, tensors both times; None without both.

    measured, planned: bytes by category.
    """
    if not measured or not planned:
        return None
    held, expected = sum(measured.values()), sum(planned.values())
    # A zero that is added takes the sign from one that was rounded.
    excess = round(held / expected - 1, 3) + 0.0
    return f"tensors held before a step: {held / 1e6:,.1f} MB, {expected / 1e6:,.1f} MB planned ({excess:+.1%})"


@dataclass(frozen=True)
class PlannedMemory:
    """What a plan says of a run: its peak, and for a picture what is alive when, by category.

    peak_bytes: as `MemoryMeter` measures it, on a GPU in the blocks of torch's allocator; on a CPU of tensors alone.
    reserved_bytes: what that allocator asks the GPU for to serve them; 0 on a CPU.
    split_bytes: alive at the peak. held_bytes: alive just before an optimizer step, the most over the rehearsed steps.
    curve: alive at moments of the rehearsal, phases: (number of the first moment, name) of its parts. travel: sentences
    on what ranks send each other, where they were asked for.
    """

    peak_bytes: int
    split_bytes: dict[str, int] = field(default_factory=dict)
    held_bytes: dict[str, int] = field(default_factory=dict)
    curve: dict[str, list[int]] = field(default_factory=dict)
    phases: list[tuple[int, str]] = field(default_factory=list)
    reserved_bytes: int = 0
    travel: list[str] = field(default_factory=list)

    @property
    def needed_bytes(self) -> int:
        """What must be free on the device."""
        return max(self.peak_bytes, self.reserved_bytes)


def _resident_bytes() -> int:
    return int(_PAGES.read_text().split()[1]) * PAGESIZE


def _peak_resident_bytes() -> int:
    if _STATUS.exists():
        # getrusage's would begin with the peak of the program that started this one.
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not there on Windows, where plans are made as well

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak() -> bool:
    """Make the process's peak what is resident now; False where the system does not let it."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def planned_memory(
    options: FineTuneOptions, plan: Callable[[FineTuneOptions], PlannedMemory], console: Console
) -> PlannedMemory | None:
    """Return what `plan` tells of the run; None, the reason printed, where it cannot be rehearsed.

    Raises InputError for what the run would refuse too, once its model is loaded.
    """
    try:
        planned = plan(options)
    except NotRehearsedError as error:
        console.print(f"note: the memory of this run is not planned: {error}", highlight=False)
        return None
    console.print(f"planned peak memory: {planned.peak_bytes / 1e9:.2f} GB", highlight=False)
    for sentence in planned.travel:
        console.print(sentence, highlight=False, soft_wrap=True)
    return planned
