"""Clocks: seconds per step, rounds in which everyone takes a turn, and what the machine's memory can do."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

COPY_BYTES = 256 << 20


class Spread(NamedTuple):
    """The middle of the measured times and where three fifths of them lie."""

    p20: float
    p50: float
    p80: float


def spread(seconds: Sequence[float]) -> Spread:
    """Return the 20th, 50th and 80th percentile."""
    return Spread(*(float(value) for value in np.percentile(seconds, (20, 50, 80))))


def read_clock() -> Callable[[], float]:
    """Return the seconds of a CPU: the process's own where it has one thread, in which its neighbours do not count."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def seconds_per_call(call: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Return the seconds that one of `repeats` calls in a row takes; on a GPU by the stream's own events."""
    if device != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / repeats


def seconds_of_parts(parts: Sequence[Callable[[], object]], device: str) -> list[float]:
    """Return the seconds that each of several calls takes, one after the other; see `read_clock`.

    On a GPU they are those of the stream's own events.
    """
    if device != "cuda":
        read = read_clock()
        stamps = [read()]
        for part in parts:
            part()
            stamps.append(read())
        return [last - first for first, last in itertools.pairwise(stamps)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for part, event in zip(parts, events[1:]):
        part()
        event.record()
    events[-1].synchronize()
    return [float(first.elapsed_time(last)) / 1e3 for first, last in itertools.pairwise(events)]


def interleave(clocks: Sequence[Callable[[], float]], rounds: Sequence[int]) -> list[list[float]]:
    """Return `rounds[i]` readings of each clock, taken in turns so that a slow minute of the machine hits everyone.

    Each round begins with another clock, because each finds the caches as the one before it left them. Clocks with
    fewer rounds take part in rounds spread evenly over the run.
    """
    readings: list[list[float]] = [[] for _ in clocks]
    most = max(rounds, default=0)
    for number in range(most):
        for turn in range(len(clocks)):
            index = (number + turn) % len(clocks)
            if (number + 1) * rounds[index] // most > number * rounds[index] // most:
                readings[index].append(clocks[index]())
    return readings


def copy_clock(device: str) -> Callable[[], float]:
    """Return the clock of `copy_` between two buffers of 256 MiB, which reads and writes `COPY_BYTES` each time.

    An update in place may be faster than it: most CPUs fetch the lines that a copy overwrites, a third transfer.
    """
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    return lambda: seconds_per_call(lambda: target.copy_(source), device)
