"""What a GPU does at most, measured: copies, products by dtype, launches; and what its profiler saw of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.held_bytes import silent_stderr
from bench.timing import COPY_BYTES, copy_clock, seconds_per_call
from lisa_kernels.plan.machines import CARDS, HOST_LINKS, LIMITS, Card, Seconds, link_seconds
from lisa_kernels.plan.work import Operation

# Sides of the square products that are measured, by bytes of a number: large enough to keep a card busy.
SIDES = {2: 8192, 4: 4096}
REPEATS, LAUNCHES = 5, 1000
# Of the rates measured here, what the operations of a step get: their shapes are not the best ones.
SHARES = (1.0, 0.75)
# Waits of the host, and what asks the driver for memory, by the names that the profiler has for them.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
ALLOCATIONS = ("cudaMalloc", "cudaMallocAsync", "cudaHostAlloc", "cuMemCreate")


@dataclass(frozen=True)
class MeasuredCard:
    """A GPU by its own rates: copies in 1e9 bytes a second, products in 1e12 operations a second, microseconds.

    launch_us: from one of the smallest kernels to the next, by the device; host_us: what the host takes to start one.
    """

    copy_gb_s: float
    tflops: float
    tflops_fp32: float
    launch_us: float
    host_us: float
    name: str = "its rates, measured"
    is_cpu: bool = False

    def seconds(self, operation: Operation) -> tuple[Seconds, str]:
        """Return what one operation takes on the device, and what bounds it there."""
        rate = (self.tflops if operation.halves else self.tflops_fp32) * 1e12
        takes = {
            "matrices": operation.products / rate, "bandwidth": operation.bytes / (self.copy_gb_s * 1e9),
            "launches": self.launch_us * 1e-6,
        }  # fmt: skip
        bound = max(LIMITS, key=lambda name: takes[name])
        # A launch takes what it takes.
        shares = (1.0, 1.0) if bound == "launches" else SHARES
        return Seconds(*(takes[bound] / share for share in shares)), bound

    def host_seconds(self, launches: int) -> Seconds:
        """Return what the host takes to start so many; autograd and modules take it some more than a bare loop."""
        return Seconds(launches * self.host_us * 1e-6, 2 * launches * self.host_us * 1e-6)

    @staticmethod
    def copy_seconds(nbytes: float) -> Seconds:
        """Return what copies from the host take by the standard of its link, which is not measured."""
        return link_seconds(nbytes, HOST_LINKS["PCIe 4"])


def measure_rates(device: torch.device, dtype: torch.dtype) -> MeasuredCard:
    """Return the rates of a GPU; dtype: the 16-bit one of its products."""
    clock = copy_clock(device.type)
    copy = statistics.median(clock() for _ in range(REPEATS))
    halves = dtype if dtype.itemsize == 2 else torch.float16
    one = torch.zeros(1, device=device)

    def start_many() -> None:
        for _ in range(LAUNCHES):
            one.add_(1.0)

    start_many()
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    start_many()
    host = time.perf_counter() - begin
    by_device = seconds_per_call(start_many, device.type)
    return MeasuredCard(
        2 * COPY_BYTES / copy / 1e9, _tflops(device, halves), _tflops(device, torch.float32),
        by_device / LAUNCHES * 1e6, host / LAUNCHES * 1e6,
    )  # fmt: skip


def _tflops(device: torch.device, dtype: torch.dtype) -> float:
    side = SIDES[dtype.itemsize]
    left = torch.full((side, side), 0.01, device=device, dtype=dtype)
    torch.mm(left, left)
    taken = [seconds_per_call(lambda: torch.mm(left, left), device.type) for _ in range(REPEATS)]
    return 2 * side**3 / statistics.median(taken) / 1e12


def known_card(name: str) -> Card | None:
    """Return the data sheet of a card by what its driver calls it; None of one that is not known."""
    words = name.lower().replace("-", " ").replace("_", " ").split()
    told = [card for key, card in CARDS.items() if _is_called(key.split("-"), words)]
    # A 4060 Ti is no 4060, and an L40 no L4.
    return max(told, key=lambda card: len(card.name), default=None)


def _is_called(wanted: list[str], words: list[str]) -> bool:
    places = [place for place in range(len(words)) if words[place : place + len(wanted)] == wanted]
    return any(words[place + len(wanted) :][:1] not in (["ti"], ["super"], ["laptop"], ["d"]) for place in places)


@dataclass(frozen=True)
class Seen:
    """What a profiler saw of one step: kernels and copies on the device, waits of the host, requests for memory."""

    launches: int
    copies: int
    waits: int
    allocations: int


def seen_by_profiler(step: Callable[[], object], device: torch.device) -> Seen | None:
    """Run a step under torch's profiler; None where it sees no device, as on CPUs or without rights to its counters."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with silent_stderr(), torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize(device)
    return seen_in(profile.events() or [])


def seen_in(events: Any) -> Seen | None:
    """Count a profiler's events; the wait that ends the profile is not the step's."""
    on_device = [event for event in events if str(event.device_type).endswith("CUDA")]
    if not on_device:
        return None
    copies = sum(event.name.startswith(("Memcpy", "Memset")) for event in on_device)
    names = [event.name for event in events]
    waits, asked = (sum(names.count(name) for name in some) for some in (WAITS, ALLOCATIONS))
    return Seen(len(on_device) - copies, copies, max(0, waits - 1), asked)
