"""W ← decay · W + leftᵀ · right in Triton: torch's product of a band of rows, then decay, sum and rounding in one pass.

The bands are the reference's own. The random words are those of the element's place in the whole weight, so programs
work on tiles of the whole weight that begin at multiples of their size, and leave out what lies before the band.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lisa_kernels.ops.fold import reference
from lisa_kernels.ops.fold.reference import BAND_ELEMENTS
from lisa_kernels.ops.random_bits import random_key
from lisa_kernels.ops.tiles import (
    ACCESS_BYTES,
    ELEMENT,
    LONGEST_VECTOR,
    VECTOR,
    WARP,
    Launch,
    tile_shape,
    vector_of,
    warp_size,
)
from lisa_kernels.ops.tiles.triton_kernel import (
    TRITON_DTYPES,
    advance,
    element_offsets,
    element_pointers,
    load_floats,
    random_state,
    random_words,
    store_floats,
    tile_mask,
    tile_offsets,
)

# Elements of a program.
ELEMENTS = 2048


@triton.jit
def fold_step(
    weight, update, decay, offsets, SHIFT: tl.constexpr, before, left, state, STOCHASTIC: tl.constexpr,
    VECTOR: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """Fold one step of a tile, whose elements from `before` to `left` are the band's."""
    ahead = tile_mask(offsets, SHIFT, before, VECTOR, ACCESS)
    mask = tile_mask(offsets, SHIFT, left, VECTOR, ACCESS) & (ahead == 0)
    new = load_floats(weight, offsets, SHIFT, mask, VECTOR, ACCESS) * decay
    new += load_floats(update, offsets, SHIFT, mask, VECTOR, ACCESS)
    _, second = random_words(state, element_offsets(offsets, SHIFT, VECTOR))
    store_floats(element_pointers(weight, offsets, SHIFT, VECTOR), new, second & 0xFFFF, mask, STOCHASTIC, ACCESS)


@triton.jit(do_not_specialize=["first", "count"], do_not_specialize_on_alignment=["weight", "update", "decay", "key"])
def fold_band(
    weight, update, decay, key, first: tl.int64, count: tl.int64, STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STEPS: tl.constexpr,
    PASSES: tl.constexpr,
):  # fmt: skip
    """Fold `update` into the `count` elements of `weight`, the first of which is element `first` of the parameter."""
    start = (first // BLOCK + tl.program_id(0)) * BLOCK
    weight = advance(weight, start - first, ACCESS)
    update = advance(update, start - first, ACCESS)
    before = tl.maximum(first - start, 0).to(tl.int32)
    left = tl.minimum(first + count - start, BLOCK).to(tl.int32)
    offsets = tile_offsets(ROWS, LANES, VECTOR, BLOCK)
    decay = tl.load(decay)
    state = random_state(tl.load(key), start)
    for step in tl.static_range(STEPS):
        fold_step(
            weight, update, decay, offsets, step * LANES * VECTOR, before, left, state, STOCHASTIC, VECTOR, ACCESS
        )


def fold_launch(
    weight: Tensor, update: Tensor, decay: Tensor, key: Tensor, first: int, stochastic: bool, warp: int = WARP
) -> Launch:
    """Return the launch that folds float32 `update` into a dense band of a weight that begins at element `first`."""
    shape = tile_shape(ELEMENTS, vector_of(weight.dtype), warp)
    unaligned = any(tensor.data_ptr() % ACCESS_BYTES for tensor in (weight, update))
    access = ELEMENT if unaligned or weight.numel() % LONGEST_VECTOR or first % LONGEST_VECTOR else VECTOR
    arguments = {"weight": weight, "update": update, "decay": decay, "key": key, "first": first}
    constants = {"STOCHASTIC": stochastic, "ACCESS": access, **shape.constants()}
    programs = -(-(first + weight.numel()) // shape.elements) - first // shape.elements
    return Launch(fold_band, {**arguments, "count": weight.numel()}, constants, programs, shape.num_warps)


def fold_(
    weight: Tensor, left: Tensor, right: Tensor, decay: Tensor, clock: Tensor, stochastic: bool, seed: int,
    parameter: int,
) -> None:  # fmt: skip
    """Fold on a GPU; the contract is the package's. float64 weights stay in torch."""
    rows, columns = weight.shape
    if weight.dtype not in TRITON_DTYPES or not weight.numel():
        reference.fold_(weight, left, right, decay, clock, stochastic, seed, parameter)
        return
    band = max(1, BAND_ELEMENTS // columns)
    key, right, warp = random_key(seed, parameter, clock), right.to(torch.float32), warp_size(weight.device)
    for start in range(0, rows, band):
        target = weight[start : start + band]
        update = left[:, start : start + band].to(torch.float32).t() @ right
        dense = target.contiguous()
        fold_launch(dense, update, decay, key, start * columns, stochastic, warp).run()
        if dense.data_ptr() != target.data_ptr():
            target.copy_(dense)
