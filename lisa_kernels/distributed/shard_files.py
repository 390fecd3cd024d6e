"""Folders that all ranks write together, each its own shards, by torch.distributed.checkpoint, and any number reads."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lisa_kernels.distributed.shards import is_sharded
from lisa_kernels.errors import InputError
from lisa_kernels.files import PARTIAL, put_in_place

# Stands in a state for a tensor of which ranks hold shards.
SHARD = "lisa_kernels shard"


def write_together(folder: Path, weights: Mapping[str, Tensor], state: Any) -> None:
    """Write weights by name and a state of nested dictionaries; every rank calls it, and the folder is there or not.

    What is not sharded all ranks hold alike, and one of them writes it.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    shards: dict[str, Tensor] = {}
    rest = io.BytesIO()
    torch.save(_without_shards(state, shards), rest)
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    alone = not dist.is_initialized()
    writes = alone or dist.get_rank() == 0
    if writes:
        # Of more ranks that were killed some files would stay.
        shutil.rmtree(partial, ignore_errors=True)
    if not alone:
        dist.barrier()
    held = {"model": dict(weights), "shards": shards, "rest": rest.getvalue()}
    with _told("written", folder):
        save(held, checkpoint_id=os.fspath(partial), no_dist=alone)
    if writes:
        put_in_place(partial, folder)
    if not alone:
        dist.barrier()


def read_state(folder: Path) -> Any:
    """Return the state in a folder, with something that stands for each sharded tensor; InputError for any other."""
    from torch.distributed.checkpoint.state_dict_loader import load

    if not (folder / ".metadata").is_file():
        raise InputError(f"{folder} holds no checkpoint that ranks wrote together (save_shards).")
    found: dict[str, Any] = {"rest": b""}
    with _told("read", folder):
        load(found, checkpoint_id=os.fspath(folder), no_dist=not dist.is_initialized())
    return torch.load(io.BytesIO(found["rest"]), weights_only=True)


def read_tensors(
    folder: Path, weights: Mapping[str, Tensor], state: Any, tensor_like: Callable[[tuple[Any, ...]], Tensor]
) -> Any:  # fmt: skip
    """Read weights into the tensors given, and return what `read_state` did with its tensors in their places.

    tensor_like: from a path of keys in the state to a tensor that is shared out as that one is to be.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    shards: dict[str, Tensor] = {}

    def make(path: tuple[Any, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        shards["/".join(map(str, path))] = made = _empty_like(tensor_like(path), shape, dtype)
        return made

    whole = _with_shards(state, (), make)
    tensors = {"model": dict(weights), "shards": shards}
    with _told("read", folder):
        load(tensors, checkpoint_id=os.fspath(folder), no_dist=not dist.is_initialized())
    return whole


@contextmanager
def _told(done: str, folder: Path) -> Iterator[None]:
    """Raise InputError on all ranks where one of them fails: torch's own error is no Exception, and all tracebacks."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        said = " ".join(f"{reason}".split()).rstrip(".") or type(reason).__name__
        raise InputError(
            f"{folder} could not be {done}: rank {rank} met {said}; see to its disk, and go on from before."
        ) from error


def _without_shards(value: Any, shards: dict[str, Tensor], path: tuple[Any, ...] = ()) -> Any:
    """Return a state with something that stands for each sharded tensor, which goes to `shards` by its path."""
    if isinstance(value, Mapping):
        return {key: _without_shards(each, shards, (*path, key)) for key, each in value.items()}
    if isinstance(value, Tensor) and is_sharded(value):
        shards["/".join(map(str, path))] = value
        return {SHARD: True, "shape": list(value.shape), "dtype": value.dtype}
    return value


def _with_shards(value: Any, path: tuple[Any, ...], make: Callable[..., Tensor]) -> Any:
    """Return a state with a tensor from make(path, shape, dtype) for all that stands for one."""
    if not isinstance(value, Mapping):
        return value
    if SHARD in value:
        return make(path, torch.Size(value["shape"]), value["dtype"])
    return {key: _with_shards(each, (*path, key), make) for key, each in value.items()}


def _empty_like(tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if not is_sharded(tensor):
        return torch.empty(shape, dtype=dtype, device=tensor.device)
    from torch.distributed.tensor import empty

    return empty(shape, dtype=dtype, device_mesh=tensor.device_mesh, placements=tensor.placements)
