"""What a device does in order: the streams of a GPU; all else does everything at once."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a queue that others can wait for."""

    def query(self) -> bool:
        """Return whether the queue has come to it."""

    def synchronize(self) -> None:
        """Let the host wait for it."""


class Queue:
    """Work that is done when it is asked for: there is nothing to wait for, and events are None."""

    def wait(self, event: Event | None) -> None:
        """Let what is queued from now on, and not the host, wait for an event."""

    def record(self) -> Event | None:
        """Return what tells that all that is queued so far is done."""
        return None

    def copy_(self, target: Tensor, source: Tensor) -> None:
        """Copy uint8 [n]."""
        # Tensors of the meta device, on which runs are planned, have sizes only.
        if not target.is_meta and not source.is_meta:
            target.copy_(source)

    def zero_(self, target: Tensor) -> None:
        """Make uint8 [n] zeros."""
        target.zero_()


class StreamQueue(Queue):
    """A stream of a GPU."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def wait(self, event: Event | None) -> None:
        """Let the stream wait."""
        if event is not None:
            self._stream.wait_event(event)  # type: ignore[arg-type]

    def record(self) -> Event | None:
        """Return an event of the stream's."""
        event: Event = self._stream.record_event()
        return event

    def copy_(self, target: Tensor, source: Tensor) -> None:
        """Copy beside the work of other streams, where the host's memory is locked."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def zero_(self, target: Tensor) -> None:
        """Make zeros."""
        with torch.cuda.stream(self._stream):
            target.zero_()


class Lanes:
    """The queues that pages of one device pass through: one to it and one from it, beside the work on it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Whether copies are only queued, so that the host's end of them must be locked in its place.
        self.queued = device.type == "cuda"
        self.inwards: Queue = StreamQueue(torch.cuda.Stream(device)) if self.queued else Queue()
        self.outwards: Queue = StreamQueue(torch.cuda.Stream(device)) if self.queued else Queue()

    @property
    def work(self) -> Queue:
        """The queue that the device's operations are put into now."""
        return StreamQueue(torch.cuda.current_stream(self.device)) if self.queued else Queue()

    @property
    def being_captured(self) -> bool:
        """Whether work is noted for a CUDA graph now, when no event may be asked for."""
        return self.queued and torch.cuda.is_current_stream_capturing()

    def empty(self, nbytes: int) -> Tensor:
        """Return uint8 [nbytes] of any content on the device, ready for what is queued in `work` from now on."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def lock(self, address: int, nbytes: int) -> int:
        """Lock host memory in its place; returns the runtime's error, 0 where there is none."""
        # A driver that has nothing to do on another device is not woken there.
        with torch.cuda.device(self.device):
            error = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 1))
            if error:
                # The runtime keeps an error until it is asked, and torch asks after each operation: this one takes it.
                with suppress(RuntimeError):
                    torch.zeros(1, device=self.device)
        return error

    def unlock(self, address: int) -> None:
        """Unlock host memory that no copy is on its way from or to."""
        torch.cuda.cudart().cudaHostUnregister(address)
