"""W ← decay · W + leftᵀ · right in Triton: one pass over W, the product of each of its tiles on the tensor cores.

The product is never in memory. Where the definition rounds W and the product in float32, so does the kernel; the
product itself differs from the definition's by the order of its sums and by what `add_product` says: under 2⁻¹⁶ + r ·
2⁻²³ of |left|ᵀ · |right|, r · 2⁻²³ alone being the definition's own. Random words are those of an element's place in
the weight, whatever the tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lisa_kernels.ops.fold import reference
from lisa_kernels.ops.random_bits import STOCHASTIC_ROUNDINGS
from lisa_kernels.ops.tiles import ACCESS_BYTES, ELEMENT, LONGEST_VECTOR, VECTOR, WARP, Launch, warp_size
from lisa_kernels.ops.tiles.triton_kernel import (
    TRITON_DTYPES,
    add_product,
    advance,
    random_words_at,
    rounded_by,
    weight_bits,
    whole_vectors,
)


class FoldTile(NamedTuple):
    """What a program works on: `M` · `N` elements of the weight, and `K` directions of the slot at a time."""

    M: int = 64
    N: int = 128
    K: int = 16
    threads: int = 128


TILE = FoldTile()
# Element by element, a wider tile's addresses would not fit in the registers.
ODD_TILE = FoldTile(32, 64)
# From this many rows or columns on, places within a tile would not fit in 32 bits.
LARGEST_SIDE = 1 << 24


@triton.jit
def product_tile(
    left, right, rows, columns, rank, is_row, is_column, ACCESS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """The tile of leftᵀ · right that begins at the columns to which `left` and `right` point, float32 [M, N]."""
    depth = tl.arange(0, K)
    left_offsets = depth[:, None] * rows + tl.arange(0, M)[None, :]
    right_offsets = depth[:, None] * columns + tl.arange(0, N)[None, :]
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, rank, K):
        is_inside = (depth < rank - start)[:, None]
        slot = tl.load(left + left_offsets, mask=is_inside & is_row[None, :], other=0)
        basis = tl.load(right + right_offsets, mask=is_inside & is_column[None, :], other=0)
        total = add_product(tl.trans(slot), basis, total)
        left = advance(left, rows.to(tl.int64) * K, ACCESS)
        right = advance(right, columns.to(tl.int64) * K, ACCESS)
    return total


@triton.jit
def load_master(weight, remainder, mask):
    """The float32 weights: those stored, or those that bfloat16 ones and their remainders make."""
    stored = tl.load(weight, mask=mask, other=0)
    if remainder is None:
        values = stored.to(tl.float32)
    else:
        difference = tl.load(remainder, mask=mask, other=0).to(tl.int32)
        bits = (stored.to(tl.uint16, bitcast=True).to(tl.int32) << 16) + difference
        values = bits.to(tl.float32, bitcast=True)
    return values


@triton.jit
def store_master(weight, remainder, values, bits16, mask, STOCHASTIC: tl.constexpr):
    """Store float32 weights: exactly, if there are remainders; else rounded, by `bits16` or to nearest."""
    if remainder is not None:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x8000) >> 16
        tl.store(remainder, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
        tl.store(weight, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    elif STOCHASTIC:
        tl.store(weight, rounded_by(values, bits16, weight.dtype.element_ty), mask=mask)
    else:
        tl.store(weight, values.to(weight.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["rows", "columns", "rank", "first"],
    do_not_specialize_on_alignment=["weight", "remainder", "left", "right", "decay", "key"],
)
def fold_tile(
    weight, remainder, left, right, decay, key, rows: tl.int64, columns: tl.int64, rank: tl.int64, first: tl.int64,
    STOCHASTIC: tl.constexpr, FAR: tl.constexpr, PART: tl.constexpr, ACCESS: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Fold one tile of a dense weight [rows, columns]; left [rank, rows] and right [rank, columns] are dense too.

    first: of a PART of a weight the index of its first element in the whole.
    """
    across = tl.cdiv(columns, N)
    row, column = tl.program_id(0) // across * M, tl.program_id(0) % across * N
    rows, columns = whole_vectors(rows.to(tl.int32), ACCESS), whole_vectors(columns.to(tl.int32), ACCESS)
    start = row * columns + column
    is_row, is_column = tl.arange(0, M) < rows - row.to(tl.int32), tl.arange(0, N) < columns - column.to(tl.int32)
    left, right = advance(left, row, ACCESS), advance(right, column, ACCESS)
    product = product_tile(left, right, rows, columns, rank.to(tl.int32), is_row, is_column, ACCESS, M, N, K)

    offsets = tl.arange(0, M)[:, None] * columns + tl.arange(0, N)[None, :]
    mask = is_row[:, None] & is_column[None, :]
    places = advance(weight, start, ACCESS) + offsets
    rests = remainder
    if remainder is not None:
        rests = advance(remainder, start, ACCESS) + offsets
    new = load_master(places, rests, mask) * tl.load(decay) + product
    element = start
    if PART:
        element += first
    bits16 = weight_bits(random_words_at(tl.load(key), element, offsets, FAR))
    store_master(places, rests, new, bits16, mask, STOCHASTIC)


def fold_launch(
    weight: Tensor, left: Tensor, right: Tensor, decay: Tensor, key: Tensor, remainder: Tensor | None,
    stochastic: bool, warp: int = WARP, tile: FoldTile | None = None, start: int = 0,
) -> Launch:  # fmt: skip
    """Return the launch that folds dense left [r, m] and right [r, n] into a dense weight [m, n]."""
    (rows, columns), rank = weight.shape, len(left)
    tensors = [weight, left, right] if remainder is None else [weight, left, right, remainder]
    odd = any(tensor.data_ptr() % ACCESS_BYTES for tensor in tensors) or any(n % LONGEST_VECTOR for n in weight.shape)
    tile = tile or (ODD_TILE if odd else TILE)
    arguments: dict[str, Tensor | int] = {"weight": weight, "left": left, "right": right, "decay": decay, "key": key}
    constants: dict[str, Any] = {
        "STOCHASTIC": stochastic and remainder is None and weight.dtype in STOCHASTIC_ROUNDINGS,
        "FAR": start + weight.numel() > 1 << 32, "ACCESS": ELEMENT if odd else VECTOR,
        # A whole weight does not pay for what parts need.
        "PART": start > 0, "M": tile.M, "N": tile.N, "K": tile.K,
    }  # fmt: skip
    (constants if remainder is None else arguments)["remainder"] = remainder
    programs = -(-rows // tile.M) * -(-columns // tile.N)
    arguments = {**arguments, "rows": rows, "columns": columns, "rank": rank, "first": start}
    return Launch(fold_tile, arguments, constants, programs, tile.threads // warp)


def _dense(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype in TRITON_DTYPES else tensor.to(torch.float32)).contiguous()


def fold_(
    weight: Tensor, left: Tensor, right: Tensor, decay: Tensor, key: Tensor | None, remainder: Tensor | None = None,
    start: int = 0,
) -> None:  # fmt: skip
    """Fold on a GPU; the contract is the package's. float64 weights stay in torch."""
    if weight.dtype not in TRITON_DTYPES or not weight.numel() or max(weight.shape) >= LARGEST_SIDE:
        reference.fold_(weight, left, right, decay, key, remainder, start)
        return
    dense, rest = weight.contiguous(), None if remainder is None else remainder.contiguous()
    # Read in any case, and without effect where rounding is to nearest.
    seen = decay.new_zeros((), dtype=torch.int64) if key is None else key
    warp = warp_size(weight.device)
    fold_launch(dense, _dense(left), _dense(right), decay, seen, rest, key is not None, warp, start=start).run()
    for given, folded in ((weight, dense), (remainder, rest)):
        if given is not None and folded is not None and given.data_ptr() != folded.data_ptr():
            given.copy_(folded)
