"""R = P Gᵀ in Triton: one pass over G for each 128 rows of P, on the tensor cores, summed in float32.

Where G has too few rows to occupy a GPU, its columns are divided among programs too; each writes a sum of its own, and
these are added in their order, so that a result never depends on timing. It errs as `add_product` says and the
contract repeats.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lisa_kernels.ops.project import reference
from lisa_kernels.ops.tiles import ACCESS_BYTES, ELEMENT, LONGEST_VECTOR, VECTOR, WARP, Launch, warp_size
from lisa_kernels.ops.tiles.triton_kernel import TRITON_DTYPES, add_product, advance, whole_vectors


class ProjectTile(NamedTuple):
    """What a program works on: `R` · `M` elements of the result, and `K` columns of G at a time."""

    R: int
    M: int
    K: int
    threads: int = 128


LARGEST_R = 128
# Programs that occupy the largest GPUs, and the columns of G per row of P below which a sum costs more than it saves:
# a program's sum is written and read again, at most a byte per element of G.
ENOUGH_PROGRAMS = 256
COLUMNS_PER_RANK = 8
# From this many rows or columns on, places within a tile would not fit in 32 bits.
LARGEST_SIDE = 1 << 24


@triton.jit(
    do_not_specialize=["rank", "rows", "columns", "span"],
    do_not_specialize_on_alignment=["basis", "gradient", "sums"],
)
def project_tile(
    basis, gradient, sums, rank: tl.int64, rows: tl.int64, columns: tl.int64, span: tl.int64,
    TRANSPOSED: tl.constexpr, ACCESS: tl.constexpr, R: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Sum P Gᵀ over `span` columns of G for one tile of the result, into sums [parts, rank, rows]."""
    bands, blocks = tl.cdiv(rank, R), tl.cdiv(rows, M)
    place = tl.program_id(0) // bands
    first, row, part = tl.program_id(0) % bands * R, place % blocks * M, place // blocks
    start = part * span
    left = whole_vectors(tl.minimum(span, columns - start).to(tl.int32), ACCESS)
    columns = whole_vectors(columns.to(tl.int32), ACCESS)
    rows = whole_vectors(rows.to(tl.int32), ACCESS)
    across, down, along = tl.arange(0, R), tl.arange(0, M), tl.arange(0, K)
    is_first, is_row = across < (rank - first).to(tl.int32), down < rows - row.to(tl.int32)

    basis = advance(basis, first * columns + start, ACCESS)
    basis_offsets = across[:, None] * columns + along[None, :]
    if TRANSPOSED:
        gradient = advance(gradient, start * rows + row, ACCESS)
        offsets = along[:, None] * rows + down[None, :]
    else:
        gradient = advance(gradient, row * columns + start, ACCESS)
        offsets = along[None, :] + down[:, None] * columns
    total = tl.zeros((R, M), tl.float32)
    for begin in tl.range(0, left, K, num_stages=2):
        is_inside = along < left - begin
        p = tl.load(basis + basis_offsets, mask=is_first[:, None] & is_inside[None, :], other=0)
        if TRANSPOSED:
            g = tl.load(gradient + offsets, mask=is_inside[:, None] & is_row[None, :], other=0)
            gradient = advance(gradient, rows.to(tl.int64) * K, ACCESS)
        else:
            g = tl.trans(tl.load(gradient + offsets, mask=is_row[:, None] & is_inside[None, :], other=0))
            gradient = advance(gradient, K, ACCESS)
        total = add_product(p, g, total)
        basis = advance(basis, K, ACCESS)

    sums = advance(sums, (part * rank + first) * rows + row, ACCESS)
    tl.store(sums + across[:, None] * rows + down[None, :], total, mask=is_first[:, None] & is_row[None, :])


def tile_of(rank: int, basis: torch.dtype, gradient: torch.dtype, odd: bool) -> ProjectTile:
    """Choose the tile: as many rows of P as there are and registers hold, and 64 bytes of a row of G at a time."""
    wide = (basis, gradient).count(torch.float32)
    largest = LARGEST_R // (4 if odd else 2 if wide == 2 else 1)
    r = min(max(16, triton.next_power_of_2(rank)), largest)
    return ProjectTile(r, 64, 16 if wide or odd else 32)


def parts_of(rank: int, rows: int, columns: int, tile: ProjectTile) -> tuple[int, int]:
    """Return into how many parts the columns are divided, and the columns of each, a multiple of the tile's."""
    tiles = -(-rank // tile.R) * -(-rows // tile.M)
    wanted = -(-columns // max(1, -(-ENOUGH_PROGRAMS // tiles)))
    span = -(-max(wanted, COLUMNS_PER_RANK * rank) // tile.K) * tile.K
    return max(1, -(-columns // span)), span


def project_launch(basis: Tensor, gradient: Tensor, warp: int = WARP, tile: ProjectTile | None = None) -> Launch:
    """Return the launch for a dense basis [r, n] and a gradient [m, n] that is dense itself or transposed.

    The argument `sums`, float32 [parts, r, m], is where it writes.
    """
    (rank, columns), rows = basis.shape, len(gradient)
    odd = any(tensor.data_ptr() % ACCESS_BYTES for tensor in (basis, gradient)) or any(
        count % LONGEST_VECTOR for count in gradient.shape
    )
    tile = tile or tile_of(rank, basis.dtype, gradient.dtype, odd)
    parts, span = parts_of(rank, rows, columns, tile)
    sums = torch.empty((parts, rank, rows), dtype=torch.float32, device=gradient.device)
    stored = gradient if gradient.is_contiguous() else gradient.t()
    arguments: dict[str, Tensor | int] = {"basis": basis, "gradient": stored, "sums": sums}
    arguments |= {"rank": rank, "rows": rows, "columns": columns, "span": span}
    constants: dict[str, Any] = {
        "TRANSPOSED": not gradient.is_contiguous(), "ACCESS": ELEMENT if odd else VECTOR,
        "R": tile.R, "M": tile.M, "K": tile.K,
    }  # fmt: skip
    programs = parts * -(-rank // tile.R) * -(-rows // tile.M)
    return Launch(project_tile, arguments, constants, programs, tile.threads // warp)


def project(basis: Tensor, gradient: Tensor) -> Tensor:
    """Project on a GPU; the contract is the package's. float64 operands stay in torch."""
    known = basis.dtype in TRITON_DTYPES and gradient.dtype in TRITON_DTYPES
    if not known or not basis.numel() or not gradient.numel() or max(gradient.shape) >= LARGEST_SIDE:
        return reference.project(basis, gradient)
    dense = gradient if gradient.t().is_contiguous() else gradient.contiguous()
    launch = project_launch(basis.contiguous(), dense, warp_size(gradient.device))
    launch.run()
    sums = launch.arguments["sums"]
    assert isinstance(sums, Tensor)
    return sums[0] if len(sums) == 1 else sums.sum(dim=0)
