"""What a step does about parameters of which each rank holds some rows: blocks stay whole, norms are of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lisa_kernels.distributed.shards import check_cut, check_placement, gathered, group_of_shards, local
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
