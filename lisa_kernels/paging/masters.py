"""Master weights in files: each is mapped, and what it becomes is a new file; at any instant old or new are whole."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.paging.file import lock_file
from lisa_kernels.paging.tensor_file import PARTIAL, Place, Stamp, header_of, mapped_whole, write_tensor_file

SUFFIX, LOCK, MARK = ".master.safetensors", ".lock", "lisa_kernels_master"


class MasterFolder:
    """A folder of which one run is the only user, with the newest generation of each master that has changed.

    What is in there belongs to the process: it goes at the end, and what a killed one has left goes at the next start.
    Raises InputError for a folder that cannot be written to, that is in use, that holds anything else, or whose disk
    has less room than `wanted_bytes`; nothing is changed then.
    """

    def __init__(self, folder: str | os.PathLike[str], wanted_bytes: int) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.bytes_written = 0
        # The newest generations.
        self.generations: set[Path] = set()
        made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        used = (self.folder / LOCK).exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("ab")
        except OSError as error:
            _remove_empty(made)
            raise InputError(
                f"{self.folder} cannot hold masters ({error.strerror}); name a folder that can be written to."
            ) from error
        if not lock_file(self._lock):
            self._lock.close()
            raise InputError(f"the masters in {self.folder} are in use by another run; name another folder.")
        if used and not made:
            # By a run that was killed.
            made = [self.folder]
        try:
            leftovers = self._leftovers()
            self._check_room(wanted_bytes, sum(path.stat().st_size for path in leftovers))
            for path in leftovers:
                path.unlink()
        except BaseException:
            if not used:
                (self.folder / LOCK).unlink(missing_ok=True)
            self._lock.close()
            _remove_empty(made)
            raise
        # At the end of the process too, where nobody says that this is over.
        self._end = weakref.finalize(self, _remove, self.folder, self.generations, self._lock, made, os.getpid())

    def _leftovers(self) -> list[Path]:
        """Return what a killed run has left; refuses a folder with anything else in it."""
        found = [path for path in self.folder.iterdir() if path.name != LOCK]
        for path in found:
            if not _is_ours(path):
                raise InputError(f"{self.folder} holds {path.name}, which is no master of a run; name an empty folder.")
        return found

    def _check_room(self, wanted: int, leftovers: int) -> None:
        free = shutil.disk_usage(self.folder).free + leftovers
        if free < wanted:
            raise InputError(
                f"masters take up to {wanted:,} bytes on the disk, and {self.folder} has {free:,} left; name a folder "
                "on another disk, or make room."
            )

    def file(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> MasterFile:
        """Return the home of a master, in which nothing is yet."""
        return MasterFile(self, name, dtype, shape)

    def close(self) -> None:
        """Delete what is here; what is mapped stays readable, and in its place on the disk, until nobody holds it."""
        self._end()


def _remove(folder: Path, generations: set[Path], lock: BinaryIO, made: Sequence[Path], process: int) -> None:
    """Delete files, lock, and the folders that were made for them; in the process that made them."""
    if os.getpid() != process:
        return
    for path in generations:
        path.unlink(missing_ok=True)
    (folder / LOCK).unlink(missing_ok=True)
    lock.close()
    _remove_empty(made)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _is_ours(path: Path) -> bool:
    """Return whether a file is one that a run of this package has made for a master, whole or not."""
    if path.name.endswith(SUFFIX + PARTIAL):
        return path.is_file()
    try:
        return path.name.endswith(SUFFIX) and MARK in header_of(path)[0].get("__metadata__", {})
    except (OSError, ValueError):
        return False


def _nowhere() -> None:
    return None


def is_left_by_a_run(folder: Path) -> bool:
    """Return whether a folder is what a run has left of its masters, and nothing else is in there."""
    if folder.is_symlink() or not (folder / LOCK).is_file():
        return False
    return all(path.name == LOCK or _is_ours(path) for path in folder.iterdir())


class MasterFile:
    """Where one master is: in a file of someone else's that is never written to, or in its newest generation here."""

    def __init__(self, folder: MasterFolder, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self._folder, self.name, self.dtype, self.shape = folder, name, dtype, tuple(shape)
        self._generation = 0
        self._path: Path | None = None
        self._stamp: Stamp | None = None
        self._borrowed = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave a copy of what has it without a home: its master is in memory then."""
        return _nowhere, ()

    def borrow(self, place: Place, stamp: Stamp) -> None:
        """Note that the master is in a file of someone else's, which had this stamp before it was read."""
        self._path, self._stamp, self._borrowed = place.path, stamp, True

    @property
    def path(self) -> Path | None:
        """The newest generation; None of one that is in a file of someone else's."""
        return None if self._borrowed else self._path

    def check(self) -> None:
        """Raise InputError where another process has changed the file: what is mapped may be another weight then."""
        if self._path is None or self._stamp is None:
            return
        try:
            now = Stamp.of(self._path)
        except OSError:
            # Deleted; what is mapped is whole.
            return
        if now == self._stamp or (self._borrowed and now.inode != self._stamp.inode):
            return
        raise InputError(
            f"{self._path}, which holds the master of {self.name}, was changed by another process; resume from the "
            "last checkpoint."
        )

    def write(self, tiles: Iterable[Tensor]) -> Tensor:
        """Put a new master, whose rows come in tiles, in the place of the old one; returns it, mapped.

        Where that fails the old one is as it was.
        """
        old = None if self._borrowed else self._path
        self._generation += 1
        path = self._write(f"{self.name}.{self._generation}{SUFFIX}", tiles)
        self._folder.generations.add(path)
        self._path, self._stamp, self._borrowed = path, Stamp.of(path), False
        mapped = mapped_whole(path, self.dtype, self.shape)
        if old is not None:
            old.unlink(missing_ok=True)
            self._folder.generations.discard(old)
        return mapped

    def aside(self, tiles: Iterable[Tensor]) -> Tensor:
        """Return a tensor like the master that takes a place on the disk, while somebody holds it, and no memory."""
        path = self._write(f"{self.name}.aside{SUFFIX}", tiles)
        mapped = mapped_whole(path, self.dtype, self.shape)
        path.unlink()
        return mapped

    def _write(self, file_name: str, tiles: Iterable[Tensor]) -> Path:
        path = self._folder.folder / file_name
        try:
            nbytes = write_tensor_file(path, self.name, self.dtype, self.shape, tiles, {"format": "pt", MARK: "1"})
        except OSError as error:
            raise InputError(
                f"cannot write the master of {self.name} into {self._folder.folder} ({error.strerror}); the one before "
                "is whole: make room or name another folder, and resume from the last checkpoint."
            ) from error
        self._folder.bytes_written += nbytes
        return path
