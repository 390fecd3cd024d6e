"""A model of random weights in safetensors files, loaded as they are mapped; and memory that is no file's."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from bench.held_bytes import status_bytes
from lisa_kernels.errors import InputError
from lisa_kernels.paging.tensor_file import write_tensor_file

# Seconds between two looks at what is resident.
INTERVAL = 0.005


def write_model(model: Any, folder: Path, pattern: Tensor) -> None:
    """Write a model without values as a folder that transformers loads, a file for each tensor.

    A pattern of numbers fills matrices, over and over, and ones all else. Raises InputError where the folder is there
    already, or its disk has less room than three times the weights: masters and what is saved of them come there too.
    """
    wanted = 3 * sum(param.nbytes for param in model.parameters())
    if folder.exists():
        raise InputError(f"{folder} is there already; name a folder that is not.")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}); name another folder.") from error
    free = shutil.disk_usage(folder).free
    if free < wanted:
        folder.rmdir()
        raise InputError(f"{folder} has {free:,} bytes left and {wanted:,} may be written; name another disk.")
    files = {}
    for number, (name, param) in enumerate(model.named_parameters()):
        files[name] = f"weight-{number:04}.safetensors"
        values = pattern if param.dim() > 1 else torch.ones_like(pattern)
        tiles = _filled(param.numel(), values)
        write_tensor_file(folder / files[name], name, values.dtype, param.shape, tiles, {"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.config.save_pretrained(folder)


def _filled(count: int, values: Tensor) -> Iterator[Tensor]:
    for start in range(0, count, len(values)):
        yield values[: count - start]


class AnonymousPeak:
    """The most resident bytes of no file that the process had since then, looked at again and again."""

    def __init__(self) -> None:
        self.bytes = status_bytes("RssAnon")
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL):
            self.bytes = max(self.bytes, status_bytes("RssAnon"))

    def __enter__(self) -> AnonymousPeak:
        """Begin to look."""
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Look no more."""
        self._over.set()
        self._watcher.join()
