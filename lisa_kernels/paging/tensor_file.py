"""One tensor in a safetensors file: written whole or not at all, found again, and mapped without being read."""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lisa_kernels.paging.file import flush_folder

PARTIAL = ".partial"
# Where the numbers begin in files of ours: on a page of their own.
HEADER_BYTES = 4096
# The header's length, as safetensors has it.
LENGTH = struct.Struct("<Q")
# A header beyond this is none.
LONGEST_HEADER = 100_000_000
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Stamp(NamedTuple):
    """What tells a file from what it becomes when someone writes to it or puts another in its place."""

    inode: int
    bytes: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Return that of a file as it is now; raises OSError."""
        found = path.stat()
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


class Place(NamedTuple):
    """Where the numbers of a tensor are in a file."""

    path: Path
    offset: int


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and where its numbers begin; raises OSError or ValueError."""
    with path.open("rb") as file:
        head = file.read(LENGTH.size)
        length = LENGTH.unpack(head)[0] if len(head) == LENGTH.size else LONGEST_HEADER
        if length >= LONGEST_HEADER:
            raise ValueError(f"{path} is no safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    return header, LENGTH.size + length


def write_tensor_file(
    path: Path, name: str, dtype: torch.dtype, shape: Sequence[int], tiles: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> int:  # fmt: skip
    """Write a tensor, whose rows come in tiles, aside, to the disk, and rename it to `path`; returns the file's bytes.

    Of the tensor no more than a tile is in memory. Raises OSError, `path` as it was, where that cannot be done.
    """
    partial = path.with_name(path.name + PARTIAL)
    nbytes = dtype.itemsize * torch.Size(shape).numel()
    entry = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [0, nbytes]}
    header = json.dumps({"__metadata__": dict(metadata), name: entry}).encode()
    length = -(-(LENGTH.size + len(header)) // HEADER_BYTES) * HEADER_BYTES - LENGTH.size
    written = 0
    try:
        with partial.open("wb") as file:
            file.write(LENGTH.pack(length) + header.ljust(length))
            for tile in tiles:
                here = tile.detach().to("cpu", dtype).contiguous()
                file.write(here.view(-1).view(torch.uint8).numpy().data)
                written += here.nbytes
            if written != nbytes:
                raise RuntimeError(f"tiles of {written} bytes are no tensor of {nbytes}")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)
    return LENGTH.size + length + nbytes


def mapped_whole(path: Path, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return the tensor of a file with one, read from the disk when it is looked at; its storage is it and no more.

    What is written into it is seen by this process alone, and takes its memory.
    """
    nbytes = dtype.itemsize * torch.Size(shape).numel()
    total = path.stat().st_size
    whole = torch.from_file(str(path), shared=False, size=total, dtype=torch.uint8).untyped_storage()
    # safetensors refuses to save and to load what is a part of a storage.
    numbers: Any = whole[total - nbytes :]
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(numbers).view(dtype).view(tuple(shape))


class MappedFile:
    """A file with many tensors, mapped once; what is written into them is seen by this process alone."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """Return one that begins at a byte of the file; raises ValueError where it does not fit in there."""
        count = torch.Size(shape).numel()
        return torch.frombuffer(self._pages, dtype=dtype, count=count, offset=offset).view(tuple(shape))
