"""The memory that a run takes, measured, beside what was planned for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from mmap import PAGESIZE
from pathlib import Path

import torch
from rich.console import Console

from lisa_kernels.errors import InputError
from lisa_kernels.train.options import FineTuneOptions

# Above this a plan did not keep its promise.
TOLERANCE = 0.05
# By so much a process grows that trains on a CPU, whatever the model: libraries loaded on the way, the data.
PROCESS_BYTES = 100_000_000
_PAGES, _STATUS = Path("/proc/self/statm"), Path("/proc/self/status")
_CLEAR_REFS, _RESET_PEAK = Path("/proc/self/clear_refs"), "5"


@dataclass(frozen=True)
class MemoryMeter:
    """The peak since it was started, beyond what was there then.

    On a GPU, of what torch allocates on it; on a CPU, of the process's resident size, which is more than tensors.
    """

    gpu: bool
    before: int

    @classmethod
    def start(cls) -> MemoryMeter:
        """Return a meter that measures from now on."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return cls(True, torch.cuda.memory_allocated())
        return cls(False, _resident_bytes() if _reset_peak() else _peak_resident_bytes())

    def peak_bytes(self) -> int:
        """Return the peak so far."""
        peak = torch.cuda.max_memory_allocated() if self.gpu else _peak_resident_bytes()
        return max(0, peak - self.before)

    def describe(self, planned: int | None) -> str:
        """Return the peak as text, beside the planned one if there is one."""
        peak = self.peak_bytes()
        text = f"peak memory {peak / 1e9:.2f} GB" + ("" if self.gpu else " (growth of the process)")
        return text if planned is None else f"{text}, {planned / 1e9:.2f} GB planned ({peak / planned - 1:+.1%})"

    def warning(self, planned: int | None) -> str | None:
        """Return what to say where the run took more than 5 % above what was planned; None where it did not."""
        peak = self.peak_bytes()
        if planned is None or peak <= planned * (1 + TOLERANCE) + (0 if self.gpu else PROCESS_BYTES):
            return None
        why = (
            "a plan knows nothing of evaluation, of buffers inside of kernels, and of other programs' tensors"
            if self.gpu
            else "on a CPU the C library keeps memory that was freed; with MALLOC_MMAP_THRESHOLD_=65536 in the "
            "environment glibc gives it back, and the run is slower"
        )
        return f"the run took {(peak - planned) / 1e9:.2f} GB more than was planned ({why})"


@dataclass(frozen=True)
class PlannedMemory:
    """What a plan says of a run: its peak, and for a picture what is alive when, by category.

    split_bytes: alive at the peak. held_bytes: alive just before an optimizer step, the most over the rehearsed steps.
    curve: alive at moments of the rehearsal, phases: (number of the first moment, name) of its parts.
    """

    peak_bytes: int
    split_bytes: dict[str, int] = field(default_factory=dict)
    held_bytes: dict[str, int] = field(default_factory=dict)
    curve: dict[str, list[int]] = field(default_factory=dict)
    phases: list[tuple[int, str]] = field(default_factory=list)


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
    """Return what `plan` tells of the run; None, the reason printed, where it cannot be rehearsed."""
    try:
        planned = plan(options)
    except InputError as error:
        console.print(f"note: the memory of this run is not planned: {error}", highlight=False)
        return None
    console.print(f"planned peak memory: {planned.peak_bytes / 1e9:.2f} GB", highlight=False)
    return planned
