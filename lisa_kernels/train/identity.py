"""What a run is made of, as checksums: a run that goes on must find it as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from lisa_kernels.errors import InputError

# Of each file of weights, with its size: enough to tell one training of a model from another.
_READ_BYTES = 1 << 20


def checksum_of_rows(rows: Iterable[dict[str, Tensor]]) -> str:
    """Return SHA-256 of the rows' tokens, labels and positions in their order, as 64 hexadecimal digits."""
    checksum = hashlib.sha256()
    for row in rows:
        for name in sorted(row):
            values = row[name].contiguous()
            checksum.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
            checksum.update(values.numpy().tobytes())
    return checksum.hexdigest()


def checksum_of_folder(folder: Path) -> str:
    """Return SHA-256 of a model's configuration and of its weights' sizes, first and last megabytes."""
    checksum = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        if not path.is_file():
            continue
        checksum.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            checksum.update(file.read(_READ_BYTES))
            file.seek(max(0, path.stat().st_size - _READ_BYTES))
            checksum.update(file.read(_READ_BYTES))
    return checksum.hexdigest()


def check_unchanged(began: dict[str, Any], now: dict[str, str], output: Path) -> None:
    """Raise InputError where a checksum is not the one that the run in `output` began with."""
    meant = {
        "model": "--model has changed",
        "backbone": "--backbone has changed",
        "autoencoder": "--autoencoder has changed",
        "rows": "the training data have changed, or the tokenizer or chat template that reads them",
        "held_out": "the held-out data have changed, or the tokenizer or chat template that reads them",
    }
    for name, checksum in now.items():
        if began.get(name, checksum) != checksum:
            raise InputError(
                f"--resume: {meant[name]} since the run in {output} began, so the rest would not belong to its "
                "beginning; put it back as it was, or begin another run (--overwrite, or another --output)."
            )
