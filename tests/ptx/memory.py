"""Global memory: host buffers under virtual addresses, with bounds and races between programs."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .faults import PtxError

Buffer = NDArray[Any] | torch.Tensor
Offsets = NDArray[np.int64]

# Far from zero and from anything that 32 bits can hold.
BASE_ADDRESS = 1 << 40
ALIGNMENT = 256
# Bytes between two buffers that belong to none.
GUARD = 512
NOBODY, SEVERAL = -1, -2


@dataclass(frozen=True)
class Segment:
    """One buffer: its first virtual address, its bytes on the host, and a name for messages."""

    start: int
    host: NDArray[np.uint8]
    name: str

    @property
    def end(self) -> int:
        """The first address behind the buffer."""
        return self.start + self.host.nbytes


class Memory:
    """The buffers that kernels may touch.

    A buffer is a contiguous NumPy array or torch CPU tensor, by reference. A launch works on a copy, which is
    written back when it ends without a fault.
    """

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._starts: list[int] = []
        self._next = BASE_ADDRESS
        # First host address of each segment, in order, with the segment.
        self._host: list[tuple[int, int]] = []
        self._owners: list[Buffer] = []
        self._bytes = np.zeros(0, np.uint8)
        self._writer = self._reader = np.zeros(0, np.int32)

    def address_of(self, buffer: Buffer) -> int:
        """Return the buffer's virtual address, the same at every call.

        A new buffer starts at a multiple of 256 bytes, as on a GPU; a part of a larger array starts as far from
        such a multiple as it does within that array. A part of a known buffer lies inside it.
        """
        host, offset = _host_bytes(buffer)
        first = host.ctypes.data
        place = bisect.bisect_right(self._host, (first, len(self._segments))) - 1
        if host.nbytes and place >= 0:
            known = self._segments[self._host[place][1]]
            delta = first - self._host[place][0]
            if delta + host.nbytes <= known.host.nbytes:
                return known.start + delta
            if delta < known.host.nbytes:
                raise PtxError("two buffers overlap on the host: pass the larger one first")
        if host.nbytes and place + 1 < len(self._host) and self._host[place + 1][0] < first + host.nbytes:
            raise PtxError("two buffers overlap on the host: pass the larger one first")
        return self._add(buffer, host, offset % ALIGNMENT)

    def _add(self, buffer: Buffer, host: NDArray[np.uint8], misalignment: int) -> int:
        start = self._next + misalignment
        kind = str(buffer.dtype).removeprefix("torch.")
        name = f"buffer {len(self._segments)} ({kind}{list(buffer.shape)})"
        if host.nbytes:
            bisect.insort(self._host, (host.ctypes.data, len(self._segments)))
        self._segments.append(Segment(start, host, name))
        self._starts.append(start)
        self._owners.append(buffer)
        self._next = -(-(start + host.nbytes + GUARD) // ALIGNMENT) * ALIGNMENT
        return start

    def translated(self, table: torch.Tensor) -> torch.Tensor:
        """Return a copy of an int64 table in which the host addresses of known buffers became virtual ones.

        So a table that a launcher made from `data_ptr()` serves the emulator.
        """
        values = table.clone()
        known = {host: self._segments[number].start for host, number in self._host}
        flat = values.view(-1)
        for place, value in enumerate(flat.tolist()):
            if value in known:
                flat[place] = known[value]
        return values

    def upload(self, track_programs: bool) -> None:
        """Copy the host's bytes in, and forget which programs touched them."""
        size = self._next - BASE_ADDRESS + ALIGNMENT
        self._bytes = np.zeros(size, np.uint8)
        for segment in self._segments:
            offset = segment.start - BASE_ADDRESS
            self._bytes[offset : offset + segment.host.nbytes] = segment.host
        tracked = size if track_programs else 0
        self._writer, self._reader = np.full(tracked, NOBODY, np.int32), np.full(tracked, NOBODY, np.int32)

    def download(self) -> None:
        """Copy changed buffers back to the host."""
        for segment in self._segments:
            offset = segment.start - BASE_ADDRESS
            now = self._bytes[offset : offset + segment.host.nbytes]
            if not np.array_equal(now, segment.host):
                segment.host[:] = now

    def outside(self, addresses: Offsets, width: int) -> int | None:
        """Return the index of an access of `width` bytes that lies in no buffer, or None."""
        low, high = int(addresses.min()), int(addresses.max())
        place = bisect.bisect_right(self._starts, low) - 1
        if place >= 0 and high + width <= self._segments[place].end:
            return None
        return self._outside_any(addresses, width)

    def _outside_any(self, addresses: Offsets, width: int) -> int | None:
        starts = np.array(self._starts, np.int64)
        ends = np.array([segment.end for segment in self._segments], np.int64)
        place = np.searchsorted(starts, addresses, "right") - 1
        wrong = (place < 0) | (addresses + width > ends[place]) if len(starts) else np.ones(addresses.shape, bool)
        return int(np.argmax(wrong)) if wrong.any() else None

    def describe(self, address: int) -> str:
        """Say where an address lies relative to the nearest buffer below it."""
        place = bisect.bisect_right(self._starts, address) - 1
        if place < 0:
            return f"address {address:#x}, before every buffer"
        segment = self._segments[place]
        inside = address - segment.start
        if inside < segment.host.nbytes:
            return f"byte {inside} of the {segment.host.nbytes} bytes of {segment.name}"
        return f"{address - segment.end} bytes behind the end of {segment.name}"

    def words(self, itemsize: int) -> tuple[NDArray[Any], int]:
        """Return the memory as unsigned integers, and the address of the first."""
        count = self._bytes.nbytes // itemsize
        return self._bytes[: count * itemsize].view(f"u{itemsize}"), BASE_ADDRESS

    def note(self, addresses: Offsets, width: int, programs: NDArray[np.int32], write: bool) -> int | None:
        """Record who touches which bytes; return the index of an access that races with another program, or None."""
        if not len(self._writer):
            return None
        index = (addresses - BASE_ADDRESS)[:, None] + np.arange(width)
        program = np.broadcast_to(programs[:, None], index.shape)
        writer, reader = self._writer[index], self._reader[index]
        wrong = (writer != NOBODY) & (writer != program)
        if write:
            wrong |= (reader != NOBODY) & (reader != program)
            self._writer[index] = program
            # Programs of one launch run at once here: two of them may write a byte in the same instruction.
            wrong |= self._writer[index] != program
        else:
            self._reader[index] = program
            mixed = ((reader != NOBODY) & (reader != program)) | (self._reader[index] != program)
            self._reader[index[mixed]] = SEVERAL
        return int(np.argmax(wrong.any(1))) if wrong.any() else None


def _host_bytes(buffer: Buffer) -> tuple[NDArray[np.uint8], int]:
    """Return a buffer's bytes, shared with it, and how far they lie from the start of the memory they belong to."""
    if isinstance(buffer, torch.Tensor):
        if buffer.device.type != "cpu" or not buffer.is_contiguous():
            raise PtxError("a buffer must be a contiguous tensor on the CPU")
        host = buffer.detach().reshape(-1).view(torch.uint8).numpy()
        return host, int(buffer.storage_offset()) * buffer.element_size()
    if not buffer.flags.c_contiguous:
        raise PtxError("a buffer must be a contiguous array")
    owner: Any = buffer
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return buffer.reshape(-1).view(np.uint8), buffer.ctypes.data - owner.ctypes.data
