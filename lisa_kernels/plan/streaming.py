"""Resting weights that are streamed from the host or a file: what they take there, and what is brought in a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from lisa_kernels.paging import Entry, SlabLayout
from lisa_kernels.paging.streamed import StreamedPages
from lisa_kernels.plan.machines import DISKS, HOST_LINKS, Seconds, disk_seconds, link_seconds
from lisa_kernels.plan.stand_ins import META
from lisa_kernels.sizes import gb

# As often as it takes until a step is as the one before: what follows is then known at each end.
ROUNDS = 4


@dataclass(frozen=True)
class StreamedBytes:
    """The codes of the blocks that are at home on the host, or in a file there.

    host_bytes: of locked memory, which all pages take or, of a file's, two buffers. buffer_bytes: of the device's two
    buffers. step_bytes: that set out for the device in a step within a period, by "forward" and "backward"
    (recomputation included), and from a file are read before. file_bytes: of the file, 0 without one.
    """

    host_bytes: int
    buffer_bytes: int
    step_bytes: Mapping[str, int] = field(default_factory=dict)
    file_bytes: int = 0

    @property
    def bytes_per_step(self) -> int:
        """What crosses over in a step."""
        return sum(self.step_bytes.values())

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {
            "host_bytes": self.host_bytes, "buffer_bytes": self.buffer_bytes, "bytes_per_step": self.bytes_per_step,
            "step_bytes": dict(self.step_bytes), "file_bytes": self.file_bytes,
        }  # fmt: skip


class Turns:
    """In which order a rehearsal reads the pages of a run's blocks, by phase."""

    def __init__(self, pages: StreamedPages, phase: Callable[[], str]) -> None:
        self.page_bytes, self._in_file = pages.page_bytes(), pages.file is not None
        self._turns: list[tuple[str, int]] = []
        pages.turns.append(lambda number: self._turns.append((phase(), number)))

    def streamed(self, step: str, repeats: float) -> StreamedBytes:
        """Return the bytes of a step whose phases begin like that; repeats: of its micro-batches."""
        taken = [(phase, number) for phase, number in self._turns if phase.startswith(step)]
        sizes, found = self.page_bytes, Counter[str]()
        for (phase, _), copied in zip(taken, copied_by_turn(sizes, [number for _, number in taken])):
            found[phase.removeprefix(step).strip()] += copied
        counted = {part: round(size * repeats) for part, size in found.items()}
        whole, buffers = sum(sizes), min(2, len(sizes)) * max(sizes)
        return StreamedBytes(buffers if self._in_file else whole, buffers, counted, whole if self._in_file else 0)


def copied_by_turn(sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    """Return the bytes that set out at each turn of a step which reads pages of these sizes in this order, again."""
    pages, copied = StreamedPages(), list[int]()
    pages.watchers.append(copied.append)
    made = [pages.page(SlabLayout([Entry("codes", (size,), torch.uint8)]), META) for size in sizes]
    found: list[int] = []
    for _ in range(ROUNDS):
        found = []
        for number in order:
            copied.clear()
            with made[number].lent(META):
                found.append(sum(copied))
    return found


def print_streamed(streamed: StreamedBytes | None, console: Console) -> None:
    """Print what is locked on the host and what crosses over; nothing of a run whose codes are on the device."""
    if streamed is None:
        return
    console.print("; ".join(_sentences(streamed)), highlight=False, soft_wrap=True)


def _sentences(streamed: StreamedBytes) -> Iterable[str]:
    nbytes, file = streamed.bytes_per_step, f"{gb(streamed.file_bytes)} of a file, " if streamed.file_bytes else ""
    yield (
        f"codes of the blocks take {file}{gb(streamed.host_bytes)} of locked host memory, and "
        f"{gb(streamed.buffer_bytes)} of the device in two buffers"
    )
    if streamed.file_bytes:
        told = _spans((name, disk_seconds(nbytes, rate)) for name, rate in DISKS.items())
        yield f"{gb(nbytes)} of them are read a step beside its work, from the disk unless memory caches them: {told}"
    told = _spans((name, link_seconds(nbytes, rate)) for name, rate in HOST_LINKS.items())
    yield f"{gb(nbytes)} of them cross over a step beside its work: {told}"


def _spans(found: Iterable[tuple[str, Seconds]]) -> str:
    return ", ".join(f"{span.low:.2f}-{span.high:.2f} s by {name}" for name, span in found)
