"""Resting weights that are streamed from the host: the memory they lock there, and what of them crosses over a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from lisa_kernels.paging import Entry, SlabLayout
from lisa_kernels.paging.streamed import StreamedPages
from lisa_kernels.plan.machines import HOST_LINKS, link_seconds
from lisa_kernels.plan.stand_ins import META
from lisa_kernels.sizes import gb

# As often as it takes until a step is as the one before: what follows is then known at each end.
ROUNDS = 4


@dataclass(frozen=True)
class StreamedBytes:
    """The codes of the blocks that are at home on the host.

    host_bytes: of all pages, in locked memory. buffer_bytes: of the device's two buffers. step_bytes: that set out for
    the device in a step within a period, by "forward" and "backward" (recomputation included).
    """

    host_bytes: int
    buffer_bytes: int
    step_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes_per_step(self) -> int:
        """What crosses over in a step."""
        return sum(self.step_bytes.values())

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {
            "host_bytes": self.host_bytes, "buffer_bytes": self.buffer_bytes, "bytes_per_step": self.bytes_per_step,
            "step_bytes": dict(self.step_bytes),
        }  # fmt: skip


class Turns:
    """In which order a rehearsal reads the pages of a run's blocks, by phase."""

    def __init__(self, pages: StreamedPages, phase: Callable[[], str]) -> None:
        self.page_bytes = pages.page_bytes()
        self._turns: list[tuple[str, int]] = []
        pages.turns.append(lambda number: self._turns.append((phase(), number)))

    def streamed(self, step: str, repeats: float) -> StreamedBytes:
        """Return the bytes of a step whose phases begin like that; repeats: of its micro-batches."""
        taken = [(phase, number) for phase, number in self._turns if phase.startswith(step)]
        sizes, found = self.page_bytes, Counter[str]()
        for (phase, _), copied in zip(taken, copied_by_turn(sizes, [number for _, number in taken])):
            found[phase.removeprefix(step).strip()] += copied
        counted = {part: round(size * repeats) for part, size in found.items()}
        return StreamedBytes(sum(sizes), min(2, len(sizes)) * max(sizes), counted)


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
    yield (
        f"codes of the blocks take {gb(streamed.host_bytes)} of locked host memory, and {gb(streamed.buffer_bytes)} of "
        "the device in two buffers"
    )
    spans = ((name, link_seconds(streamed.bytes_per_step, rate)) for name, rate in HOST_LINKS.items())
    told = ", ".join(f"{span.low:.2f}-{span.high:.2f} s by {name}" for name, span in spans)
    yield f"{gb(streamed.bytes_per_step)} of them cross over a step beside its work: {told}"
