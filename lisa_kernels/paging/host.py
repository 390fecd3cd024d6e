"""The store that keeps slabs in host memory, locked where a GPU copies from it, and moves them beside other work."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.paging.store import Page, Store

# What the driver locks memory by: two buffers must not share such a piece.
LOCKED_PIECE = 4096


class CopyLane:
    """Copies in one direction beside the work on a device: a stream of its own on GPUs, plain copies elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy_(self, target: Tensor, source: Tensor, after: torch.cuda.Event | None = None) -> torch.cuda.Event | None:
        """Copy after the work queued on the current stream and after an event; returns what tells that it is done."""
        if self._stream is None:
            # Tensors of the meta device, on which runs are planned, have sizes only.
            if not target.is_meta and not source.is_meta:
                target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        (target if target.is_cuda else source).record_stream(self._stream)
        done: torch.cuda.Event = self._stream.record_event()
        return done

    def wait(self, copied: torch.cuda.Event | None) -> None:
        """Let the current stream, and not the host, wait for a copy."""
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)


class HostStore(Store):
    """Keeps pages in host memory: one buffer for each page, of its exact size, used again once its page is freed.

    On GPUs the buffers are plain memory that is locked afterwards, for torch's own allocator of locked memory rounds
    sizes up to powers of two. Copies in and out run on streams of their own, in both directions at once.
    """

    kind = "host"

    def __init__(self) -> None:
        self._lanes: dict[torch.device, tuple[CopyLane, CopyLane]] = {}
        self._idle: dict[tuple[int, torch.device], list[Tensor]] = {}
        self._held = 0
        # Told of each slab that is made on a device; plans count them.
        self.watch: Callable[[Tensor], None] = lambda slab: None

    def page(self, name: str, nbytes: int, device: torch.device) -> HostPage:
        """Return a new page of zeros for slabs of `device`."""
        return HostPage(self, name, nbytes, device)

    @property
    def nbytes(self) -> int:
        """How many bytes of host memory the store holds."""
        return self._held

    def lanes(self, device: torch.device) -> tuple[CopyLane, CopyLane]:
        """Return the lanes to and from `device`."""
        if device not in self._lanes:
            self._lanes[device] = CopyLane(device), CopyLane(device)
        return self._lanes[device]

    def borrow(self, nbytes: int, device: torch.device) -> Tensor:
        """Return a buffer, uint8 [nbytes] of any content, that copies from and to `device` can use."""
        idle = self._idle.get((nbytes, device))
        if idle:
            return idle.pop()
        try:
            buffer = _locked(nbytes) if device.type == "cuda" else torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        except RuntimeError as error:
            raise InputError(
                f"host memory has no {nbytes} bytes left for a page, beside {self._held} that pages hold; "
                'use paging="file:DIR" with a folder on a fast disk.'
            ) from error
        self._held += nbytes
        return buffer

    def put_away(self, buffer: Tensor, device: torch.device) -> None:
        """Take a buffer back, for the next page of its size."""
        self._idle.setdefault((buffer.numel(), device), []).append(buffer)


def _locked(nbytes: int) -> Tensor:
    """Return uint8 [nbytes] of page-locked host memory; where it cannot be locked it is plain, with a warning."""
    whole = torch.empty(nbytes + 2 * LOCKED_PIECE, dtype=torch.uint8, device="cpu")
    begin = -whole.data_ptr() % LOCKED_PIECE
    address, size = whole.data_ptr() + begin, -(-nbytes // LOCKED_PIECE) * LOCKED_PIECE
    buffer = whole[begin : begin + nbytes]
    error = torch.cuda.cudart().cudaHostRegister(address, size, 1)
    if int(error) != 0:
        warnings.warn(
            f"{nbytes} bytes of host memory cannot be locked ({error}): copies of pages will wait for one another. "
            "Raise the limit of locked memory (ulimit -l).",
            stacklevel=2,
        )
        return buffer
    # Whatever reads the memory, as numpy does, holds this tensor.
    weakref.finalize(buffer, _unlock, address).atexit = False
    return buffer


def _unlock(address: int) -> None:
    """Unlock memory that is about to be freed, once no copy can be on its way to it."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)


class HostPage(Page):
    """A slab that is at home in host memory."""

    def __init__(self, store: HostStore, name: str, nbytes: int, device: torch.device) -> None:
        super().__init__(name, nbytes, device)
        self._store = store
        # From the first `give_back` on: a slab that never leaves the device takes no host memory.
        self._home: Tensor | None = None
        self._inwards, self._outwards = store.lanes(device)
        self._slab: Tensor | None = None
        self._taken = False
        self._arrival: torch.cuda.Event | None = None
        self._departure: torch.cuda.Event | None = None

    def prefetch(self) -> None:
        """Begin the copy to the device, into memory of the current stream."""
        if self._slab is None and self._home is not None:
            self._slab = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
            self._store.watch(self._slab)
            self._arrival = self._inwards.copy_(self._slab, self._home, after=self._departure)

    def take(self) -> Tensor:
        """Return the slab on the device; the current stream waits for the copy, the host does not."""
        self.prefetch()
        if self._slab is None:
            self._slab = torch.zeros(self.nbytes, dtype=torch.uint8, device=self.device)
            self._store.watch(self._slab)
        self._inwards.wait(self._arrival)
        self._arrival, self._taken = None, True
        return self._slab

    def give_back(self) -> None:
        """Begin the copy home and free the device's."""
        if self._taken and self._slab is not None:
            if self._home is None:
                self._home = self._store.borrow(self.nbytes, self.device)
            self._departure = self._outwards.copy_(self._home, self._slab)
            self._slab, self._taken = None, False

    def home(self) -> Tensor:
        """Return the slab in host memory."""
        return torch.zeros(self.nbytes, dtype=torch.uint8, device="cpu") if self._home is None else self._home

    def settle(self) -> None:
        """Wait for the copy home."""
        if self._departure is not None:
            self._departure.synchronize()

    def free(self) -> None:
        """Give the buffer to the next page of its size."""
        # The next page's first copy into the buffer follows this page's on the outward lane, and the current stream.
        self._inwards.wait(self._arrival)
        if self._home is not None:
            self._store.put_away(self._home, self.device)
        self._home, self._slab, self._arrival, self._taken = None, None, None, False
