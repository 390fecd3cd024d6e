"""Tensors of which each rank holds some rows, as `fully_shard` (FSDP2) leaves parameters between forward and backward.

A rank holds consecutive rows of the first dimension, the last ranks fewer or none. What is done to each element alone
is done to the rows a rank holds; random numbers are keyed by an element's place in the whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from lisa_kernels.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether this process may hold a part only."""
    # Without the module there is no such tensor.
    home = sys.modules.get("torch.distributed.tensor")
    return home is not None and isinstance(tensor, home.DTensor)


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return the rows that this rank holds, which share their memory with the tensor; a plain tensor is its own."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the rows of all ranks, which ask for it together; a plain one is its own."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _row_elements(tensor: Tensor) -> int:
    return tensor.shape[1:].numel()


def rows_per_rank(tensor: DTensor) -> int:
    """Return how many rows every rank but the last ones holds."""
    return -(-tensor.shape[0] // tensor.device_mesh.size())


def first_row(tensor: Tensor) -> int:
    """Return which row of the whole the first one here is."""
    if not is_sharded(tensor):
        return 0
    return min(rows_per_rank(tensor) * tensor.device_mesh.get_local_rank(), tensor.shape[0])


def first_element(tensor: Tensor) -> int:
    """Return the index in the whole of the first element here."""
    return first_row(tensor) * _row_elements(tensor)


def group_of_shards(tensor: DTensor) -> dist.ProcessGroup:
    """Return the ranks that hold a tensor's rows between them."""
    return tensor.device_mesh.get_group()


def shard_like(tensor: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """Return the tensor of `shape` of which this rank's rows are these, shared out as `tensor` is, if it is."""
    if not is_sharded(tensor):
        return rows
    from torch.distributed.tensor import DTensor

    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=strides
    )  # fmt: skip


def rows_like(tensor: Tensor, value: Tensor) -> Tensor:
    """Return of a value of a tensor's shape the rows that this rank holds of the tensor; a shard's own, or cut out."""
    if is_sharded(value) or not is_sharded(tensor):
        return local(value)
    start = first_row(tensor)
    return value[start : start + len(local(tensor))]


def check_placement(name: str, tensor: DTensor) -> None:
    """Raise InputError unless ranks hold rows of the tensor, in their order, where they compute."""
    placements = tensor.placements
    if len(placements) != 1 or not placements[0].is_shard(0):
        raise InputError(
            f"{name} is placed {list(placements)} over {tensor.device_mesh.ndim} dimensions of a mesh; rows shared out "
            "over one dimension are wanted, as fully_shard does with a mesh of one: without tensor parallelism, "
            "replicas of shards, or a shard_placement_fn."
        )
    if tensor.device.type != tensor.device_mesh.device_type:
        raise InputError(
            f"{name} waits on {tensor.device.type} for its forward on {tensor.device_mesh.device_type} "
            "(CPUOffloadPolicy), where it could not be stepped; shard without an offload policy."
        )


def check_cut(name: str, tensor: DTensor, unit: int, what: str, advice: str) -> None:
    """Raise InputError where a rank's rows begin within one of the units of so many elements that stay together."""
    rows, elements = rows_per_rank(tensor), _row_elements(tensor)
    if rows < tensor.shape[0] and rows * elements % unit:
        raise InputError(
            f"{name} {list(tensor.shape)} is shared out in {rows} rows a rank, {rows * elements} elements, and "
            f"{what} of {unit} would be cut; {advice}"
        )


def gathered(measured: Tensor, group: Any) -> Tensor:
    """Return [ranks, n] for a contiguous [n] of each rank, on its device and without waiting for it."""
    found = [torch.empty_like(measured) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, measured, group=group)
    return torch.stack(found)


def sharded_among(tensors: Iterable[Tensor]) -> list[DTensor]:
    """Return those of which this rank may hold a part only."""
    return [tensor for tensor in tensors if is_sharded(tensor)]


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of all elements of some tensors, those on other ranks included, 0-d; the same on all ranks."""
    shards = sharded_among(tensors)
    plain = get_total_norm([tensor for tensor in tensors if not is_sharded(tensor)])
    if not shards:
        return plain
    own = get_total_norm([local(tensor) for tensor in shards]).to(torch.float64).square().reshape(1)
    return (gathered(own, group_of_shards(shards[0])).sum() + plain.to(own).square()).sqrt()
