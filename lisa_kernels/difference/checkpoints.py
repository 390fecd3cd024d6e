"""Weights of a model folder, read one tensor at a time."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lisa_kernels.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a folder's safetensors files, of which none is in memory before it is asked for.

    A context manager: the files are open in it. `nbytes` is the size of all tensors. Raises InputError for a folder
    without such files, or with one that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nbytes = 0
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Checkpoint:
        for file in self._names():
            try:
                opened = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
                self._files.update(dict.fromkeys(opened.keys(), opened))
            except (OSError, SafetensorError) as error:
                self._stack.close()
                raise InputError(f"{self.folder / file} cannot be read ({error}); give a whole checkpoint.") from error
            # What is before the tensors is their table.
            self.nbytes += (self.folder / file).stat().st_size
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stack.close()

    def _names(self) -> list[str]:
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        if not (self.folder / INDEX).is_file():
            raise InputError(f"{self.folder} has no {SINGLE}: give a model that save_pretrained wrote as safetensors.")
        files: dict[str, str] = json.loads((self.folder / INDEX).read_text())["weight_map"]
        return sorted(set(files.values()))

    @property
    def names(self) -> set[str]:
        """The names of the tensors."""
        return set(self._files)

    def shape(self, name: str) -> list[int]:
        """Return a tensor's shape without reading it."""
        return list(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; its first row is read."""
        first: Tensor = self._files[name].get_slice(name)[:1]
        return first.dtype

    def size_bytes(self, name: str) -> int:
        """Return how many bytes a tensor takes; its first row is read."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor
