"""What crosses between host and device while a run is rehearsed: streamed codes, and masters that learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lisa_kernels.paging.master_copies import MasterCopies
from lisa_kernels.paging.streamed import StreamedPages

if TYPE_CHECKING:
    from lisa_kernels.plan.rehearsal import Workload

COPY = torch.ops.aten.copy_.default
CODES_IN, MASTERS_IN, MASTERS_OUT = "codes to the device", "masters to the device", "masters to the host"


class Move(NamedTuple):
    """Bytes that set out after so many events of the trace."""

    event: int
    bytes: int
    kind: str


class Moves:
    """Notes what crosses over in a rehearsal; it is told every operation, as the `watch` of a `StorageTracker`.

    A master that is elsewhere is a single number read as a matrix: copies from and to one are a run's copies of it.
    """

    def __init__(self) -> None:
        self.found: list[Move] = []
        self.event: Callable[[], int] = lambda: 0

    def __call__(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, phase: str, part: str
    ) -> None:  # fmt: skip
        """Note a copy of a master."""
        if func is COPY:
            target, source = args[0], args[1]
            if _is_elsewhere(target) != _is_elsewhere(source):
                self._note(target, MASTERS_OUT if _is_elsewhere(target) else MASTERS_IN)

    def follow(self, pages: StreamedPages) -> None:
        """Note the copies of streamed pages, too."""
        pages.watchers.append(lambda nbytes: self.found.append(Move(self.event(), nbytes, CODES_IN)))

    def follow_masters(self, copies: MasterCopies) -> None:
        """Note the copies of masters that pass on lanes of their own, too."""

        def note(nbytes: int, inwards: bool) -> None:
            self.found.append(Move(self.event(), nbytes, MASTERS_IN if inwards else MASTERS_OUT))

        copies.watchers.append(note)

    def _note(self, moved: Tensor, kind: str) -> None:
        self.found.append(Move(self.event(), moved.numel() * moved.element_size(), kind))


def _is_elsewhere(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.numel() > 1 and not any(tensor.stride())


def moves_of(workload: Workload) -> list[Move]:
    """Return what crosses over in the rehearsal of a workload whose weights rest; nothing of another's."""
    from lisa_kernels.plan.gpu_memory import GpuMemory
    from lisa_kernels.plan.rehearsal import rehearse

    moves = Moves()
    if getattr(workload, "resting", None) is not None:
        rehearse(workload, gpu=GpuMemory.here(), moves=moves)
    return moves.found
