"""The clock of a step's parts, in which what a backward computes again is told apart from the backward itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch

from bench.timing import read_clock

PARTS = ("forward", "recomputation", "backward", "optimizer")


class PartsClock:
    """Notes when each part of a step begins; on a GPU by the stream's own events, which nothing waits for.

    `contexts` goes to checkpointed blocks, and says when one is computed again. host_seconds: what the host took to
    hand all of the step to the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._read = time.perf_counter if device.type == "cuda" else read_clock()
        self._marks: list[tuple[str, Any]] = []
        self._begin = self.host_seconds = 0.0

    def begin(self) -> None:
        """Begin a step, once the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._marks, self._begin = [], self._read()

    def enter(self, part: str) -> None:
        """Give what follows to a part; "" ends the step."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, self._read()))

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return what `torch.utils.checkpoint` enters for a forward and for computing it again."""
        return nullcontext(), self._again()

    @contextmanager
    def _again(self) -> Iterator[None]:
        self.enter("recomputation")
        try:
            yield
        finally:
            # It may end early, by an error of its own, once everything is there that the backward wants.
            self.enter("backward")

    def seconds(self) -> dict[str, float]:
        """Wait for the end of the step, and return the seconds of each part."""
        self.enter("")
        self.host_seconds = self._read() - self._begin
        if self.device.type == "cuda":
            self._marks[-1][1].synchronize()
        totals = dict.fromkeys(PARTS, 0.0)
        for (part, first), (_, last) in pairwise(self._marks):
            totals[part] += first.elapsed_time(last) / 1e3 if self.device.type == "cuda" else last - first
        return totals
