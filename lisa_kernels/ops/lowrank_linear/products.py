"""Matrix products of the linear layers: 16-bit operands, sums in float32, whatever the device does well.

On CPUs without 16-bit matrix units torch's own dY W runs at 0.2 GFLOP/s and its x Wᵀ at 10. There the operands are
multiplied in float32, tile by tile: neither a weight nor the activations ever exist in float32 as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lisa_kernels.ops.capability import multiplies_bfloat16

HALVES = (torch.bfloat16, torch.float16)
# Up to so many rows torch's own x Wᵀ is faster than converting W: a token or two, where text is generated.
FEW_ROWS = 8
# Elements of the stored matrix held in float32 at a time: 4 MiB stay in the last cache.
TILE_ELEMENTS = 1 << 20
# Elements of the activations' longer side held in float32 at a time, 32 MiB.
ROW_ELEMENTS = 1 << 23


# Asked once: a compiled model looks at it in every layer.
_MATRIX_UNITS = {
    torch.bfloat16: any(
        getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ),
    torch.float16: bool(getattr(torch.cpu, "_is_amx_fp16_supported", bool)()),
}


def has_matrix_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies 16-bit matrices in hardware, so that torch's own products are fast."""
    return _MATRIX_UNITS[dtype]


def is_slow(tensor: Tensor) -> bool:
    """Return whether torch's own products of this tensor are the slow ones."""
    return tensor.device.type == "cpu" and tensor.dtype in HALVES and not has_matrix_units(tensor.dtype)


def _spans(length: int, width: int, elements: int) -> Iterator[slice]:
    """Yield slices of `length` rows of `width` elements that hold about `elements` each, at least 16 rows."""
    step = max(16, elements // max(width, 1))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return left [..., k] @ right [k, n] in the operands' dtype; `right` is stored as it is or transposed."""
    rows = left.reshape(-1, left.shape[-1])
    if not is_slow(left) or (len(rows) <= FEW_ROWS and _is_transposed(right)):
        return left @ right
    result = torch.empty(len(rows), right.shape[1], dtype=left.dtype)
    for span in _spans(len(rows), max(right.shape), ROW_ELEMENTS):
        _multiply(rows[span].to(torch.float32), right, result[span])
    return result.view(*left.shape[:-1], right.shape[1])


def _is_transposed(matrix: Tensor) -> bool:
    """Return whether a matrix is stored column by column, as W is read in x Wᵀ."""
    return matrix.stride(0) == 1 and matrix.shape[0] > 1


def _multiply(left: Tensor, right: Tensor, result: Tensor) -> None:
    """Write left (float32) @ right into `result`, with a tile of `right` in float32 at a time."""
    transposed = _is_transposed(right)
    stored = right.t() if transposed else right
    tile = torch.empty(min(stored.numel(), max(TILE_ELEMENTS, 16 * stored.shape[1])), dtype=torch.float32)
    total = None if transposed else torch.zeros(len(left), right.shape[1], dtype=torch.float32)
    for span in _spans(len(stored), stored.shape[1], TILE_ELEMENTS):
        part = stored[span]
        wide = tile[: part.numel()].view(part.shape).copy_(part)
        if total is None:
            result[:, span] = left @ wide.t()
        else:
            total.addmm_(left[:, span], wide)
    if total is not None:
        result.copy_(total)


def add_product_(result: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale · left @ right to `result`: [..., m], [..., k] and [k, m] of any float dtype, few k.

    In one product without a temporary of the result's size; `right` is rounded to its dtype, as under autocast.
    """
    if is_slow(result):
        # The scale goes where there are k numbers a row, not m.
        result += ((left.to(torch.float32) * scale) @ right.to(torch.float32)).to(result.dtype)
        return
    rows = left.reshape(-1, left.shape[-1])
    result.view(-1, result.shape[-1]).addmm_(rows, right.to(result.dtype), alpha=scale)


def _multiplies_into_float32(tensor: Tensor) -> bool:
    """Return whether torch has a product of 16-bit matrices with a float32 result where this tensor is."""
    if tensor.device.type not in ("cuda", "meta") or tensor.dtype not in HALVES:
        return False
    # Tensors without values are a plan's, of a run on a GPU that can do it.
    return tensor.is_meta or tensor.dtype == torch.float16 or multiplies_bfloat16(tensor.device)


def sum_of_outer_products(left: Tensor, right: Tensor) -> Tensor:
    """Return leftᵀ right, float32 [a, b], for rows left [..., a] and right [..., b], summed in float32."""
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    if left.dtype == right.dtype == torch.float32:
        return left.t() @ right
    if left.dtype == right.dtype and _multiplies_into_float32(left):
        # On tensor cores, which converting the operands would leave idle.
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float32, device=left.device)
    for span in _spans(len(left), max(left.shape[1], right.shape[1]), ROW_ELEMENTS):
        total.addmm_(left[span].to(torch.float32).t(), right[span].to(torch.float32))
    return total


def weight_gradient_in(dtype: torch.dtype, dy: Tensor, x: Tensor) -> Tensor:
    """Return dYᵀ x [m, n] in `dtype`, summed in float32, for rows dy [..., m] and x [..., n]."""
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if not is_slow(dy):
        return (dy.t() @ x).to(dtype)
    gradient = torch.empty(dy.shape[1], x.shape[1], dtype=dtype)
    for span in _spans(dy.shape[1], x.shape[1], TILE_ELEMENTS):
        gradient[span] = sum_of_outer_products(dy[:, span], x)
    return gradient
