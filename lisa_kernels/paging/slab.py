"""Named tensors laid out one after the other in bytes, so that all of them move with one copy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# What the CUDA allocator aligns its blocks to: every tensor of a slab is as aligned as one of its own would be.
ALIGNMENT = 512


class Entry(NamedTuple):
    """One tensor of a slab."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a dense tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class SlabLayout:
    """The places of named tensors in a slab of `nbytes` bytes, each a multiple of 512 from its beginning."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = tuple(entries)
        self._places: list[tuple[int, int]] = []
        self._strides = [_strides(entry.shape) for entry in self.entries]
        self.nbytes = 0
        for entry in self.entries:
            size = torch.Size(entry.shape).numel() * entry.dtype.itemsize
            self._places.append((self.nbytes, self.nbytes + size))
            self.nbytes += -(-size // ALIGNMENT) * ALIGNMENT

    def begin(self, name: str) -> int:
        """Return the byte at which a tensor begins."""
        return next(begin for entry, (begin, _) in zip(self.entries, self._places) if entry.name == name)

    def views(self, slab: Tensor) -> dict[str, Tensor]:
        """Return the tensors by name as views of `slab`, uint8 [nbytes]."""
        typed = {dtype: slab.view(dtype) for dtype in {entry.dtype for entry in self.entries}}
        return {
            entry.name: typed[entry.dtype].as_strided(entry.shape, strides, begin // entry.dtype.itemsize)
            for entry, strides, (begin, _) in zip(self.entries, self._strides, self._places)
        }

    def views_apart(self, slab: Tensor) -> dict[str, Tensor]:
        """Return the tensors by name as views of `slab`, uint8 [nbytes] on the CPU, each with a storage of its own.

        They can be copied and saved one by one: `torch.save` takes no tensors of different dtypes in one storage.
        """
        content, views = slab.numpy().data, {}
        for entry, (begin, end) in zip(self.entries, self._places):
            count = (end - begin) // entry.dtype.itemsize
            flat = torch.frombuffer(content, dtype=entry.dtype, count=count, offset=begin) if count else None
            views[entry.name] = torch.empty(entry.shape, dtype=entry.dtype) if flat is None else flat.view(entry.shape)
        return views
