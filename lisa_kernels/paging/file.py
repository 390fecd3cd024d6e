"""The store that keeps slabs in files, for state larger than memory; a file is whole or not there at any instant."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.paging.store import Page, Store

SUFFIX, PARTIAL, LOCK = ".page", ".page.partial", ".lock"
MAGIC, VERSION = b"LISAPAGE", 1
# Magic, version, checksum of the body, bytes of the body, digest of the run and the page's name; then zeros.
HEADER = struct.Struct("<8sIIQ32s")
HEADER_BYTES = 512


class FileStore(Store):
    """Keeps each page in a file of its own in a folder of which it is the only user.

    A page is written to a new file, flushed to the disk, and renamed over the old one: a kill or a full disk leaves
    the old one whole. Files say by a checksum whether they are whole and by a digest whose they are. They are read
    through a memory map, so that the system may drop them from memory. Raises InputError for a folder that cannot be
    written to, that another process uses, or that holds pages of another run.
    """

    kind = "file"

    def __init__(self, folder: str, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder).absolute()
        self._identity = dict(identity)
        self._pages: dict[str, int] = {}
        self._made = not self.folder.exists()
        self._lock = self._open()
        try:
            self._remove_leftovers()
        except BaseException:
            self._lock.close()
            raise

    def _open(self) -> BinaryIO:
        """Make the folder and return a file in it, locked as long as it is open."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / LOCK).open("wb")
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot hold pages ({error.strerror}); name a folder that can be written to."
            ) from error
        if not lock_file(lock):
            lock.close()
            raise InputError(f"{self.folder} is in use by another optimizer or process; name another folder.")
        return lock

    def _remove_leftovers(self) -> None:
        """Delete what a killed process of this run left; refuse what is not this run's before anything is deleted."""
        found = sorted(self.folder.glob(f"*{SUFFIX}"))
        for path in found:
            check_page_file(path, self.digest(path.name.removesuffix(SUFFIX)))
        for path in [*found, *self.folder.glob(f"*{PARTIAL}")]:
            path.unlink()

    def digest(self, name: str) -> bytes:
        """Return what a page of this name carries in this run and in no other."""
        return page_digest(self._identity, name)

    def page(self, name: str, nbytes: int, device: torch.device, slot_bytes: int = 0) -> FilePage:
        """Return a new page of zeros for slabs of `device`; its file is there from its first `give_back`."""
        self._pages[name] = nbytes
        return FilePage(self, name, nbytes, device)

    @property
    def nbytes(self) -> int:
        """How many bytes the pages take on the disk when all are written."""
        return sum(self._pages.values())

    def forget(self, name: str) -> None:
        """Delete a page's file."""
        self._pages.pop(name, None)
        (self.folder / f"{name}{SUFFIX}").unlink(missing_ok=True)

    def close(self) -> None:
        """Delete all pages, and the folder if this store made it."""
        for name in list(self._pages):
            self.forget(name)
        (self.folder / LOCK).unlink(missing_ok=True)
        self._lock.close()
        if self._made and self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def lock_file(file: BinaryIO) -> bool:
    """Lock a file until it is closed; false where another has locked it. Windows has no such lock: always true."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def page_digest(identity: Mapping[str, Any], name: str) -> bytes:
    """Return what a page of a run carries, 32 bytes."""
    return hashlib.sha256(json.dumps([identity, name], sort_keys=True).encode()).digest()


def check_page_file(path: Path, digest: bytes) -> int:
    """Return the checksum of a page's body; InputError for a file that is no page, cut short, or of another run."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER.size)
    except OSError as error:
        raise InputError(f"the page {path} cannot be read ({error.strerror}); resume from a checkpoint.") from error
    if len(head) < HEADER.size or head[: len(MAGIC)] != MAGIC:
        raise InputError(f"{path} is not a page of optimizer state; name an empty folder.")
    _, version, checksum, nbytes, whose = HEADER.unpack(head)
    if version != VERSION:
        raise InputError(f"{path} is a page of format {version}; this version reads {VERSION}: name an empty folder.")
    if whose != digest:
        raise InputError(f"{path} is a page of another run; name another folder, or delete the page.")
    if size != HEADER_BYTES + nbytes:
        raise InputError(f"{path} is cut short: {size} bytes of {HEADER_BYTES + nbytes}; resume from a checkpoint.")
    return int(checksum)


def write_page_file(path: Path, digest: bytes, body: Tensor) -> int:
    """Write uint8 [n] on the CPU as a page, aside, to the disk, and rename it to `path`; returns its checksum.

    Raises OSError, `path` as it was, where that cannot be done.
    """
    partial = path.with_name(path.name.removesuffix(SUFFIX) + PARTIAL)
    content = body.numpy().data
    checksum = zlib.crc32(content)
    header = HEADER.pack(MAGIC, VERSION, checksum, content.nbytes, digest)
    try:
        with partial.open("wb") as file:
            file.write(header.ljust(HEADER_BYTES, b"\0"))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)
    return checksum


def flush_folder(folder: Path) -> None:
    """Bring a rename to the disk; Windows does so by itself and cannot open folders."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FilePage(Page):
    """A slab that is at home in a file."""

    def __init__(self, store: FileStore, name: str, nbytes: int, device: torch.device) -> None:
        super().__init__(name, nbytes, device)
        self._store = store
        self.path = store.folder / f"{name}{SUFFIX}"
        self._home: Tensor | None = None
        self._slab: Tensor | None = None
        self._checksum = 0

    def prefetch(self) -> None:
        """Ask the system to read the file, where it can be asked."""
        if self._slab is None and self._home is not None and hasattr(os, "posix_fadvise") and self.path.exists():
            with self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def take(self) -> Tensor:
        """Return a copy of the file's content on the device, once its checksum is found right."""
        if self._slab is None and self._home is None:
            self._slab = torch.zeros(self.nbytes, dtype=torch.uint8, device=self.device)
        elif self._slab is None:
            self._slab = self._read().to(self.device)
        return self._slab

    def _read(self) -> Tensor:
        assert self._home is not None
        # A map of a file that was cut short meanwhile would end the process. One that was deleted is whole.
        checksum = check_page_file(self.path, self._digest) if self.path.exists() else self._checksum
        body = self._home.clone()
        if checksum != self._checksum or zlib.crc32(body.numpy().data) != checksum:
            raise InputError(f"{self.path} was changed or damaged (its checksum is wrong); resume from a checkpoint.")
        return body

    @property
    def _digest(self) -> bytes:
        return self._store.digest(self.name)

    def give_back(self) -> None:
        """Write the slab to a new file and put it in the place of the old one."""
        if self._slab is None:
            return
        body = self._slab.cpu()
        try:
            self._checksum = write_page_file(self.path, self._digest, body)
            self._home = _mapped(self.path, self.nbytes)
        except OSError as error:
            raise InputError(
                f"cannot write the page {self.path} ({error.strerror}); the pages written before are whole. Make room "
                "or name another folder, and resume from the last checkpoint."
            ) from error
        self._slab = None

    def home(self) -> Tensor:
        """Return the file's content as a memory map, zeros where there is no file yet."""
        if self._home is None:
            return torch.zeros(self.nbytes, dtype=torch.uint8)
        return self._home

    def settle(self) -> None:
        """Raise InputError if the file was cut short or replaced since it was written."""
        if self._home is not None and self.path.exists():
            check_page_file(self.path, self._digest)

    def free(self) -> None:
        """Delete the file."""
        self._home = self._slab = None
        self._store.forget(self.name)


def _mapped(path: Path, nbytes: int) -> Tensor:
    """Return the body of a page as uint8 [nbytes], a private map that is read from the disk when it is looked at."""
    whole = torch.from_file(str(path), shared=False, size=HEADER_BYTES + nbytes, dtype=torch.uint8)
    return whole[HEADER_BYTES:]
