"""Shared memory of many programs at once, with races between warps and reads of unwritten bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

NOBODY, SEVERAL = -1, -2
WIDEST_ACCESS = 16


class SharedMemory:
    """`size` bytes per program, laid end to end.

    Warps are numbered over all programs. Lanes of one warp run in step, so only different warps can race. Two warps
    may store the same value in the same place in one instruction: a layout that repeats a value over warps does.
    """

    def __init__(self, programs: int, size: int) -> None:
        self.size = size
        self._stride = -(-max(size, 1) // WIDEST_ACCESS) * WIDEST_ACCESS
        total = programs * self._stride
        self._bytes = np.zeros(total, np.uint8)
        self._written = np.zeros(total, bool)
        self._writer = np.full(total, NOBODY, np.int32)
        self._reader = np.full(total, NOBODY, np.int32)

    def place(self, program: NDArray[np.int64], address: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the bytes at each program's address lie."""
        return program * self._stride + address

    def words(self, itemsize: int) -> NDArray[Any]:
        """Return all bytes as unsigned integers."""
        return self._bytes.view(f"u{itemsize}")

    def unwritten(self, place: NDArray[np.int64], width: int) -> int | None:
        """Return the index of an access that reads a byte nobody has written, or None."""
        missing = ~self._written[place[:, None] + np.arange(width)].all(1)
        return int(np.argmax(missing)) if missing.any() else None

    def note_read(self, place: NDArray[np.int64], width: int, warp: NDArray[np.int32]) -> int | None:
        """Record a read; return the index of one whose byte another warp wrote since the last barrier, or None."""
        index = place[:, None] + np.arange(width)
        reader, writer = self._reader[index], self._writer[index]
        by = np.broadcast_to(warp[:, None], index.shape)
        self._reader[index] = by
        mixed = ((reader != NOBODY) & (reader != by)) | (self._reader[index] != by)
        self._reader[index[mixed]] = SEVERAL
        wrong = (writer != NOBODY) & (writer != by)
        return int(np.argmax(wrong.any(1))) if wrong.any() else None

    def note_write(
        self, place: NDArray[np.int64], values: NDArray[np.uint8], warp: NDArray[np.int32]
    ) -> tuple[str, int] | None:
        """Record the write of `values` uint8 [accesses, width] and make it.

        Returns the kind ("read" or "written") and index of one that touches a byte that another warp touched since
        the last barrier, or None.
        """
        index = place[:, None] + np.arange(values.shape[1])
        by = np.broadcast_to(warp[:, None], index.shape)
        reader, writer = self._reader[index], self._writer[index]
        read_before = (reader != NOBODY) & (reader != by)
        written_before = (writer != NOBODY) & (writer != by)
        self._bytes[index] = values
        self._writer[index] = by
        self._written[index] = True
        written_before |= (self._writer[index] != by) & (self._bytes[index] != values)
        for kind, wrong in (("read", read_before), ("written", written_before)):
            if wrong.any():
                return kind, int(np.argmax(wrong.any(1)))
        return None

    def barrier(self, programs: NDArray[np.bool_]) -> None:
        """Order everything before for the chosen programs."""
        for owner in (self._writer, self._reader):
            owner.reshape(-1, self._stride)[programs] = NOBODY
