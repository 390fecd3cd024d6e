"""A checkpoint on machines whose disks do not have it: rank 0 sends it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lisa_kernels.distributed import Ranks, on_first
from lisa_kernels.errors import InputError
from lisa_kernels.train.checkpoint import SHARDS

# In the output folder of a machine that shares none.
LENT = ".lent-"
# Bytes that travel together.
PORTION = 1 << 26


@contextmanager
def on_every_machine(checkpoint: Path | None, ranks: Ranks | None) -> Iterator[Path | None]:
    """Give a checkpoint of rank 0's disk as this machine has it, or a copy beside its place, for as long as it is used.

    One rank of each machine that lacks it writes what rank 0 sends. Raises InputError on all ranks where it cannot.
    """
    if checkpoint is None or ranks is None:
        yield checkpoint
        return
    lacking = ranks.tell(None if checkpoint.is_dir() else platform.node())
    if not any(lacking):
        yield checkpoint
        return
    if on_first(ranks, lambda: (checkpoint / SHARDS).is_dir()):
        raise InputError(
            f"{checkpoint}, which ranks wrote together, is not on the disk of all that go on; start them where all see "
            "one disk, or copy it to each machine."
        )
    copy = checkpoint.with_name(f"{LENT}{checkpoint.name}")
    machine = lacking[ranks.rank]
    writes = machine is not None and lacking.index(machine) == ranks.rank
    try:
        _send(checkpoint, copy if writes else None, ranks)
        with ranks.together():
            if machine is not None and not copy.is_dir():
                raise InputError(f"{copy}, which rank {lacking.index(machine)} has written, is not on this machine.")
        yield checkpoint if machine is None else copy
        # The machine's other ranks may be reading still.
        ranks.tell(None)
    finally:
        if writes:
            shutil.rmtree(copy, ignore_errors=True)


def _send(checkpoint: Path, copy: Path | None, ranks: Ranks) -> None:
    """Send the files of rank 0's checkpoint to all ranks, of which those with a `copy` write them there."""
    files = on_first(ranks, lambda: [(path.name, path.stat().st_size) for path in sorted(checkpoint.iterdir())])
    with ranks.together():
        if copy is not None:
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir(parents=True)
    for name, size in files:
        for start in range(0, size, PORTION):
            portion = torch.empty(min(PORTION, size - start), dtype=torch.uint8)
            with ranks.together():
                if ranks.rank == 0:
                    _read_into(portion, checkpoint / name, start)
            ranks.take_first_(portion)
            with ranks.together():
                if copy is not None:
                    with (copy / name).open("ab") as file:
                        file.write(portion.numpy().data)


def _read_into(portion: Tensor, path: Path, start: int) -> None:
    with path.open("rb") as file:
        file.seek(start)
        if file.readinto(portion.numpy().data) != len(portion):
            raise InputError(f"{path} ended before its end; resume from another checkpoint.")
