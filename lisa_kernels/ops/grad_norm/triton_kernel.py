"""The largest magnitude and the sum of squares of many tensors in Triton: one pass, two numbers per program.

Magnitudes are compared as integers: the bits of a float32 without its sign are in the order of its magnitude, with
infinity above all numbers and NaN above infinity, so that neither is lost. Squares are summed after a scaling by the
power of two that brings the program's largest magnitude to [1, 2), so that none overflows, in float32 over a tile and
in float64 over the tiles: always in the same order. A square passes through at most 24 roundings to float32: its own,
15 sums of a thread's elements and 8 over the threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lisa_kernels.ops.tiles import (
    WARP,
    Launch,
    TableGroup,
    pointer_table,
    rows_by_dtypes,
    split,
    table_launches,
    tile_shape,
    vector_of,
    warp_size,
)
from lisa_kernels.ops.tiles.triton_kernel import TRITON_DTYPES, advance, load_floats, tile_mask, tile_offsets, work_item

# Elements of a program.
ELEMENTS = 4096
EXPONENT = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
ONE = tl.constexpr(1 << 23)


@triton.jit
def load_step(grad, offsets, SHIFT: tl.constexpr, left, VECTOR: tl.constexpr, ACCESS: tl.constexpr):
    """One step of a tile as float32."""
    return load_floats(grad, offsets, SHIFT, tile_mask(offsets, SHIFT, left, VECTOR, ACCESS), VECTOR, ACCESS)


@triton.jit(do_not_specialize_on_alignment=["table", "work", "largest", "squares"])
def grad_norm_many(
    table, work, largest, squares, GRAD: tl.constexpr, SQUARES: tl.constexpr, ACCESS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STEPS: tl.constexpr,
    PASSES: tl.constexpr,
):  # fmt: skip
    """Write the largest magnitude, float32, and sum of squares, float64, of each tile that `work` lists [programs]."""
    row, tile = work_item(work)
    start = tile * BLOCK
    left = tl.minimum(tl.load(table + row * 8 + 7) - start, BLOCK).to(tl.int32)
    grad = advance(tl.load(table + row * 8).to(tl.pointer_type(GRAD)), start, ACCESS)
    offsets = tile_offsets(ROWS, LANES, VECTOR, BLOCK)
    gs = ()
    for step in tl.static_range(STEPS):
        g = load_step(grad, offsets, step * LANES * VECTOR, left, VECTOR, ACCESS)
        gs = gs + (g,)  # noqa: RUF005 - Triton has no starred tuples
    bits = gs[0].to(tl.int32, bitcast=True) & MAGNITUDE
    for step in tl.static_range(1, STEPS):
        bits = tl.maximum(bits, gs[step].to(tl.int32, bitcast=True) & MAGNITUDE)
    top = tl.max(tl.max(tl.max(bits, axis=2), axis=1), axis=0)
    tl.store(largest + tl.program_id(0), top.to(tl.float32, bitcast=True))
    if SQUARES:
        # 2**exponent of the largest, kept where it and its inverse are ordinary numbers.
        unit = tl.minimum(tl.maximum(top & EXPONENT, ONE), 253 * ONE)
        scale = (254 * ONE - unit).to(tl.float32, bitcast=True)
        total = (gs[0] * scale) * (gs[0] * scale)
        for step in tl.static_range(1, STEPS):
            total += (gs[step] * scale) * (gs[step] * scale)
        total = tl.sum(tl.sum(tl.sum(total, axis=2), axis=1), axis=0).to(tl.float64)
        unit = unit.to(tl.float32, bitcast=True).to(tl.float64)
        tl.store(squares + tl.program_id(0), total * unit * unit)


def grad_norm_launches(grads: Sequence[Tensor], squares: bool, warp: int = WARP) -> list[Launch]:
    """Return the launches over non-empty gradients, one per dtype and access, each with results of its own."""
    table, device = pointer_table((grads,)), grads[0].device
    groups = []
    for (dtype,), rows in rows_by_dtypes((grads,)).items():
        shape = tile_shape(ELEMENTS, vector_of(dtype), warp)
        for tiles in split(table, rows, shape.elements, (0,)):
            constants = {"GRAD": TRITON_DTYPES[dtype], "SQUARES": squares, "ACCESS": tiles.access, **shape.constants()}
            own = {
                "largest": torch.empty(tiles.programs, dtype=torch.float32, device=device),
                "squares": torch.zeros(tiles.programs if squares else 1, dtype=torch.float64, device=device),
            }
            groups.append(TableGroup(grad_norm_many, tiles, constants, shape.num_warps, own=own))
    return table_launches(table, groups, {}, device)


def combine(launches: Sequence[Launch], device: torch.device) -> Tensor:
    """Return float64 [2] of what the launches wrote."""
    largest = torch.cat([launch.arguments["largest"] for launch in launches] or [torch.zeros(1, device=device)])
    squares = [launch.arguments["squares"].sum() for launch in launches]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([largest.amax().to(torch.float64), total])


def grad_norm(grads: list[Tensor], squares: bool) -> Tensor:
    """Measure gradients on a GPU; the contract is the package's."""
    device = grads[0].device
    some = [grad for grad in grads if grad.numel()]
    launches = grad_norm_launches(some, squares, warp_size(device)) if some else []
    for launch in launches:
        launch.run()
    return combine(launches, device)
