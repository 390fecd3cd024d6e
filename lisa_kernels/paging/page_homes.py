"""Where pages that the device only reads are at home, in host memory or in a file, and how they come from there."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

import torch
from torch import Tensor

from lisa_kernels.paging.buffers import Buffer, LastUse, Slot, copy_in_order
from lisa_kernels.paging.locked import HostMemory
from lisa_kernels.paging.page_file import PageFile
from lisa_kernels.paging.queues import Lanes


class PageSlot(Slot):
    """Device memory for one page after the other.

    staged: they come from a file, through as many bytes of host memory where the device has memory of its own.
    """

    def __init__(self, lanes: Lanes, capacity: int, host: HostMemory, staged: bool) -> None:
        super().__init__(lanes, capacity)
        self._lanes = lanes
        self.staging = host.buffer(capacity) if staged and lanes.queued else None
        self._reading: Future[None] | None = None

    def read(self, file: PageFile, begin: int) -> None:
        """Have the file's bytes set out in the place of what was on its way; the rest of theirs is `arrive`'s."""
        end = self._host_end()
        self._reading = file.read(begin, end.bytes, end.last.event)

    def arrive(self) -> None:
        """Let the host wait for the disk, if what is on its way comes from there; InputError where it fails."""
        reading, self._reading = self._reading, None
        if reading is None:
            return
        try:
            reading.result()
        except BaseException:
            self.page = None
            raise
        if self.staging is not None:
            copy_in_order(self._lanes.inwards, self, self._host_end())

    def _host_end(self) -> Buffer:
        if self.staging is None:
            return self
        return Buffer(self.staging.bytes[: self.bytes.numel()], self.staging.last)


class PageHome(Protocol):
    """Where a page is between uses."""

    def send(self, lanes: Lanes, slot: PageSlot) -> None:
        """Have the content set out for a slot of its size."""

    def write(self, lanes: Lanes, begin: int, content: Tensor) -> None:
        """Put uint8 [n] there from a byte on, in the order of the current stream; what sets out then has them."""

    def content(self) -> Tensor:
        """Return a copy of all, uint8 [n] in host memory."""


class InMemory(Buffer):
    """At home in host memory."""

    @classmethod
    def plain(cls, content: Tensor) -> InMemory:
        """Return one that no device has used."""
        return cls(content, LastUse(None))  # type: ignore[arg-type]

    def send(self, lanes: Lanes, slot: PageSlot) -> None:
        """Copy it; nobody waits for that but the device."""
        copy_in_order(lanes.inwards, slot, self)

    def write(self, lanes: Lanes, begin: int, content: Tensor) -> None:
        """Copy bytes there."""
        work = lanes.work
        work.wait(self.last.event)
        work.copy_(self.bytes[begin : begin + content.numel()], content)
        self.last.event = work.record()

    def content(self) -> Tensor:
        """Return a copy."""
        self.settle()
        return self.bytes.clone()

    def settle(self) -> None:
        """Let the host wait for the last use."""
        if self.last.event is not None:
            self.last.event.synchronize()


class InFile:
    """At home in a part of a file."""

    def __init__(self, file: PageFile, nbytes: int) -> None:
        self._file, self._begin, self._nbytes = file, file.place(nbytes), nbytes

    def send(self, lanes: Lanes, slot: PageSlot) -> None:
        """Have it read by the file's thread."""
        if not slot.memory.is_meta:
            slot.read(self._file, self._begin)

    def write(self, lanes: Lanes, begin: int, content: Tensor) -> None:
        """Write bytes there; the host waits for them."""
        made = lanes.work.record()
        if made is not None:
            made.synchronize()
        self._file.write(self._begin + begin, content.cpu())

    def content(self) -> Tensor:
        """Read it."""
        content = torch.empty(self._nbytes, dtype=torch.uint8, device="cpu")
        self._file.read(self._begin, content, None).result()
        return content
