"""A file for pages that can be made again: it has no name, so that nothing is left of it however its process ends."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol

from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.paging.freed import give_back_freed_memory
from lisa_kernels.paging.queues import Event

# Bytes written between two looks at the memory that they were made in.
BETWEEN_LOOKS = 1 << 26


class Thread(Protocol):
    """What does one thing after the other beside its caller."""

    def submit(self, work: Callable[..., None], /, *given: object) -> Future[None]:
        """Do it after all that was asked for before."""

    def shutdown(self) -> None:
        """Come to an end once all is done."""


class PageFile:
    """Bytes on the disk of a folder, which a thread reads and writes in the order that it is asked.

    The file is made at the first write, with room for all pages, and the folder does not show it: two processes never
    share one, and the system takes it back from one that is killed. Raises InputError, one sentence, for a folder that
    is none, that cannot be written to, or whose disk has less room than the pages take, and where a disk fails.
    """

    def __init__(self, folder: str, thread: Thread | None = None) -> None:
        self.folder = folder
        self.nbytes = self.bytes_read = self.bytes_written = 0
        self._file: BinaryIO | None = None
        self._looked_at = 0
        self._thread = thread or ThreadPoolExecutor(1, "pages")

    def place(self, nbytes: int) -> int:
        """Return where a page of so many bytes begins."""
        begin, self.nbytes = self.nbytes, self.nbytes + nbytes
        return begin

    def read(self, begin: int, into: Tensor, after: Event | None) -> Future[None]:
        """Read into uint8 [n] of host memory after the event of its last use; returns what tells when that is done."""
        return self._thread.submit(self._read, begin, into, after)

    def write(self, begin: int, content: Tensor) -> None:
        """Write uint8 [n] of host memory; returns when what is asked for from now on reads it."""
        self._thread.submit(self._write, begin, content).result()

    def close(self) -> None:
        """Give the disk its room back."""
        self._thread.shutdown()
        if self._file is not None:
            self._file.close()

    def _read(self, begin: int, into: Tensor, after: Event | None) -> None:
        if after is not None:
            after.synchronize()
        assert self._file is not None
        left = into.numpy().data
        try:
            self._file.seek(begin)
            while left:
                count = self._file.readinto(left)  # type: ignore[attr-defined]
                if not count:
                    raise OSError(0, "it was cut short")
                left = left[count:]
        except OSError as error:
            raise self._failed("read from", error) from error
        self.bytes_read += into.numel()

    def _write(self, begin: int, content: Tensor) -> None:
        left = content.numpy().data
        try:
            file = self._file or self._made()
            file.seek(begin)
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            raise self._failed("written to", error) from error
        self.bytes_written += content.numel()
        if self.bytes_written - self._looked_at >= BETWEEN_LOOKS:
            self._looked_at = self.bytes_written
            give_back_freed_memory()

    def _made(self) -> BinaryIO:
        folder = checked_folder(self.folder)
        free = shutil.disk_usage(folder).free
        if free < self.nbytes:
            raise InputError(
                f"the codes of weights that rest take {self.nbytes:,} bytes on the disk, and {folder} has {free:,} "
                "left; name a folder on another disk, or make room."
            )
        try:
            self._file = tempfile.TemporaryFile(buffering=0, dir=folder)  # type: ignore[assignment]  # noqa: SIM115
            # What lies between tensors is never written.
            self._file.truncate(self.nbytes)
        except OSError as error:
            raise InputError(
                f"{folder} cannot hold codes of weights that rest ({error.strerror}); name a folder that can be "
                "written to."
            ) from error
        return self._file

    def _failed(self, what: str, error: OSError) -> InputError:
        return InputError(
            f"codes of weights that rest cannot be {what} a file in {self.folder} ({error.strerror}); their masters "
            "are elsewhere and whole: name another folder or make room, and go on from the last checkpoint."
        )


def checked_folder(folder: str) -> Path:
    """Return a folder that is there; InputError for any other."""
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        what = "a file" if path.exists() else "not there"
        raise InputError(
            f"resting_where={folder!r} names a folder that is {what}; give 'device', 'host', or a folder that is there."
        )
    return path
