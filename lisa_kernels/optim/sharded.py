"""What a step does about parameters of which each rank holds some rows: blocks stay whole, norms are of all rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lisa_kernels.distributed.shards import (
    check_cut,
    check_placement,
    first_element,
    gathered,
    group_of_shards,
    is_sharded,
    local,
    shard_like,
    sharded_among,
)
from lisa_kernels.errors import InputError
from lisa_kernels.ops.adamw8 import FOUR
from lisa_kernels.ops.grad_norm import grad_norm

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def joined(measured: Tensor) -> Tensor:
    """Return [largest, sum] of what `grad_norm` measured of several lists of gradients, [lists, 2]."""
    return torch.stack([measured[:, 0].amax(), measured[:, 1].sum()])


def measure_shards(grads: Sequence[DTensor], squares: bool) -> Tensor:
    """Return what `grad_norm` would of gradients of which each rank holds rows; the same bits on all of them."""
    here = [rows for rows in map(local, grads) if rows.numel()]
    empty = torch.zeros(2, dtype=torch.float64, device=grads[0].device)
    own = grad_norm(here, squares=squares) if here else empty
    return joined(gathered(own, group_of_shards(grads[0])))


def check_steppable(param: DTensor, in_8_bits: bool, block_size: int) -> None:
    """Raise InputError unless ranks can step the rows they hold as the whole would be."""
    name = f"a parameter {list(param.shape)}"
    check_placement(name, param)
    if in_8_bits:
        check_cut(name, param, block_size, "blocks", "use a smaller block_size, or another number of ranks.")
    elif param.dtype != torch.float32:
        check_cut(name, param, FOUR, "fours", "use another number of ranks, or float32 weights.")


# Of a state the tensors that have an item for each of the parameter's elements, and for each block of them.
ELEMENTS, BLOCKS = ("m", "v", "m_codes", "v_codes"), ("m_absmax", "v_absmax")


def _block_shape(param: Tensor, block_size: int) -> tuple[int, int, int]:
    """Return (rows, groups, blocks): how many rows end with a block, the groups of so many rows, and blocks in each."""
    elements = param.shape[1:].numel()
    rows = block_size // math.gcd(elements, block_size)
    return rows, -(-param.shape[0] // rows), elements * rows // block_size


def state_for_all(param: DTensor, state: Mapping[str, Tensor], block_size: int) -> dict[str, Tensor]:
    """Return the state of a sharded parameter as it is saved: as shards too, which any number of ranks can load.

    Moments then have the parameter's shape, and scales are [groups, blocks]: a group is as many rows as end with a
    block, with zeros behind the last of them. The tensors share the state's memory where they can.
    """
    rows, groups, blocks = _block_shape(param, block_size)
    saved = dict(state)
    for name, value in state.items():
        if name in ELEMENTS:
            saved[name] = shard_like(param, value.view(local(param).shape), param.shape)
        elif name in BLOCKS:
            own = -(-local(param).shape[0] // rows)
            padded = torch.nn.functional.pad(value, (0, own * blocks - len(value)))
            saved[name] = shard_like(param, padded.view(own, blocks), torch.Size((groups, blocks)))
    return saved


def state_from_all(param: Tensor, saved: Mapping[str, Tensor], block_size: int) -> dict[str, Tensor]:
    """Return the state that a parameter has here, of what was saved: shards of ours, or all of it by any ranks.

    What does not fit comes back as it is.
    """
    found = dict(saved)
    for name, value in saved.items():
        if name not in (*ELEMENTS, *BLOCKS) or not (is_sharded(param) or is_sharded(value) or value.dim() > 1):
            continue
        each = 1 if name in ELEMENTS else block_size
        count, total = -(-local(param).numel() // each), -(-param.numel() // each)
        flat = local(value).reshape(-1)
        if not is_sharded(value):
            start = first_element(param) // each
            flat = flat[:total][start:] if len(flat) >= total else flat
        found[name] = flat[:count]
    return found


def place_among(params: Iterable[Tensor]) -> dict[str, list[int]]:
    """Return what tells a rank's state with shards from another's; nothing where all are whole."""
    shards = sharded_among(params)
    return {"shards": [shards[0].device_mesh.get_local_rank(), shards[0].device_mesh.size()]} if shards else {}


def check_own(saved: Mapping[str, Any], params: Iterable[Tensor]) -> None:
    """Raise InputError for a state with another rank's shards; `saved` is what `place_among` said of it."""
    if "shards" in saved and saved["shards"] != place_among(params).get("shards"):
        rank, count = saved["shards"]
        raise InputError(
            f"the state holds the shards of rank {rank} of {count}; save it with save_shards() and load it with "
            "load_shards() on any number of ranks, or have each of as many ranks load its own."
        )
