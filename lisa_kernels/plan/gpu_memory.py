"""What a GPU holds beside the tensors that operations return: cuBLAS's workspaces, and what our own work takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import lisa_kernels.ops.adamw8
import lisa_kernels.ops.grad_norm  # noqa: F401  (both define operations that are named here)
from lisa_kernels.ops import lowrank_embedding, lowrank_linear, resting_linear
from lisa_kernels.ops.lowrank_embedding.reference import band_width
from lisa_kernels.plan.stand_ins import META

KIB = 2**10
# Of torch 2.14, for cards before Hopper (capability 9.0) and from there on; one for each thread that multiplies.
WORKSPACE_BYTES, LARGE_WORKSPACE_BYTES = 8320 * KIB, 32768 * KIB
LARGE_FROM = (9, 0)

# Of one launch over many tensors: 8 numbers of 8 bytes for each tensor, and one for each tile.
ROW_BYTES, ITEM_BYTES = 64, 8
# Elements of a tile of `grad_norm`, and of the smallest one of a step, where tensors of more tiles need no table.
NORM_TILE, STEP_TILE, STEP_TILES = 4096, 1024, 1024

# In whose place our own stands on a GPU, which adds up a band of columns at once: float32 twice, and for each token
# its id and places, and what sorts them.
TABLE_GRADIENT = torch.ops.aten.embedding_dense_backward.default
BAND_BYTES, TOKEN_BYTES = 8, 64

GRAD_NORM = torch.ops.lisa_kernels.grad_norm.default
STEPS = (torch.ops.lisa_kernels.adamw8_.default, torch.ops.lisa_kernels.adamw32_.default)


@dataclass(frozen=True)
class GpuMemory:
    """What a run takes on a GPU and a CPU does not know; workspace_bytes: of cuBLAS, for each thread that multiplies.

    Forward and step multiply in one thread, the backward in autograd's own.
    """

    workspace_bytes: int
    definitions: ClassVar = {
        **lowrank_linear.DEFINITIONS, **lowrank_embedding.DEFINITIONS, **resting_linear.DEFINITIONS
    }  # fmt: skip

    @classmethod
    def here(cls) -> GpuMemory:
        """Return that of the GPU that is here; without one the most that any has, so that no plan says too little."""
        small = torch.cuda.is_available() and torch.cuda.get_device_capability() < LARGE_FROM
        return cls(WORKSPACE_BYTES if small else LARGE_WORKSPACE_BYTES)

    def workspace(self) -> Tensor:
        """Return what a thread gets at its first product and keeps."""
        return _empty(self.workspace_bytes, torch.uint8)

    @staticmethod
    def inside(func: Any, args: tuple[Any, ...]) -> Sequence[Tensor]:
        """Return the tensors that an operation holds while it runs and no other operation makes in a rehearsal."""
        if func is GRAD_NORM:
            return norm_tables(args[0])
        if func is TABLE_GRADIENT:
            return bands(*args[:2])
        return step_tables(args[0]) if func in STEPS else ()


def norm_tables(grads: Sequence[Tensor]) -> list[Tensor]:
    """Return the results by tile, float32 and float64, the former a second time when they are combined, and tables."""
    tables = []
    tiles = 0
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        count = sum(-(-grad.numel() // NORM_TILE) for grad in grads if grad.dtype == dtype)
        tiles += count
        tables += [_empty(count, torch.float32), _empty(count, torch.float64)]
    return [*tables, _table(len(grads), tiles), _empty(tiles, torch.float32)]


def step_tables(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the table of a step, its tiles at their most: large tensors have launches of their own and need none."""
    return [_table(len(params), sum(min(-(-param.numel() // STEP_TILE), STEP_TILES) for param in params))]


def bands(dy: Tensor, ids: Tensor) -> list[Tensor]:
    """Return what adding up the gradient of a table holds beside it: dy [..., n] and the ids of its tokens."""
    width = min(dy.shape[-1], band_width(max(1, ids.numel())))
    return [_empty(ids.numel() * (width * BAND_BYTES + TOKEN_BYTES), torch.uint8)]


def _empty(count: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(count, dtype=dtype, device=META)


def _table(tensors: int, tiles: int) -> Tensor:
    return _empty(tensors * ROW_BYTES + tiles * ITEM_BYTES, torch.uint8)
