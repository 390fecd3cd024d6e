"""Host memory that a GPU copies from and to: locked, so that the copies run beside everything else."""

from __future__ import annotations

import sys
import warnings
from functools import partial

import torch
from torch import Tensor

from lisa_kernels.paging.buffers import Buffer, LastUse, let_go_after
from lisa_kernels.paging.queues import Lanes

# What the driver locks memory by: two buffers must not share such a piece.
LOCKED_PIECE = 4096


class HostMemory:
    """Makes buffers of host memory for the pages of one device, plain memory that is locked afterwards for a GPU.

    torch's own allocator of locked memory rounds sizes up to powers of two.
    """

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._locked_bytes = 0
        self._warned = False

    def buffer(self, nbytes: int) -> Buffer:
        """Return a buffer of any content; RuntimeError where there is no memory left."""
        last = LastUse(self._lanes)
        if not self._lanes.queued or nbytes == 0:
            return Buffer(torch.empty(nbytes, dtype=torch.uint8, device="cpu"), last)
        return Buffer(self._locked(nbytes, last), last)

    def _locked(self, nbytes: int, last: LastUse) -> Tensor:
        """Return uint8 [nbytes] of locked memory; where it cannot be locked it is plain, and the first time says so."""
        whole = torch.empty(nbytes + 2 * LOCKED_PIECE, dtype=torch.uint8, device="cpu")
        begin = -whole.data_ptr() % LOCKED_PIECE
        address, size = whole.data_ptr() + begin, -(-nbytes // LOCKED_PIECE) * LOCKED_PIECE
        # What is made of it, tensors and arrays alike, keeps this view and not only the memory.
        view = whole.numpy()[begin : begin + nbytes]
        error = self._lanes.lock(address, size)
        if error == 0:
            self._locked_bytes += size
            let_go_after(view, last, partial(self._lanes.unlock, address), whole)
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"{size} bytes of host memory cannot be locked beside {self._locked_bytes} that pages of "
                f"{self._lanes.device} have locked (error {error} of CUDA's runtime): copies of pages will wait for "
                f"one another. {locked_memory_limit()}",
                stacklevel=2,
            )
        return torch.frombuffer(view, dtype=torch.uint8)


def locked_memory_limit() -> str:
    """Say how much memory this process may lock, and what to do about it."""
    if sys.platform == "win32":
        return 'Windows lends a process about half of the machine\'s memory; paging="file:DIR" needs none.'
    import resource

    bytes_allowed, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if bytes_allowed == resource.RLIM_INFINITY:
        return "The process has no limit (ulimit -l), so the machine's own is reached: page less, or use file:DIR."
    return (
        f"The process's limit is {bytes_allowed} bytes; raise it before the start by `ulimit -l unlimited`, a line "
        '"memlock" in /etc/security/limits.conf, or --ulimit memlock=-1 of a container.'
    )
