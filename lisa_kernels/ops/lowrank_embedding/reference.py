"""The embedding whose table's gradient is formed in a basis only, or in full, in plain PyTorch.

    y = f · (E[ids] + B[:, ids]ᵀ P)      E [V, n], P [r, n], B [r, V], f a constant of the model
    dB[:, id] += f · P dy                summed over the tokens of each id: exactly P Gᵀ for G [V, n]

Tokens are projected before they are scattered: G never exists, and what is scattered is r wide. The tokens of an id
are added in their order, on every device, so that equal batches give equal bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.ops.lowrank_linear.products import add_product_, matmul

# Elements of a band of columns: `table_gradient` holds eight bytes for each beside the table, 4 MiB.
BAND = 1 << 19


def _flat(dy: Tensor, ids: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Return (dy [tokens, n], ids [tokens]), the rows of the padding id zero; -1 stands for no padding."""
    rows, flat = dy.reshape(-1, dy.shape[-1]), ids.reshape(-1)
    if padding >= 0:
        rows = rows.masked_fill((flat == padding).unsqueeze(1), 0.0)
    return rows, flat


def add_rows_(total: Tensor, place: Tensor, rows: Tensor) -> Tensor:
    """Add row i of `rows` [k, w] to row place[i] of `total` [m, w], in the order of i; returns `total`.

    On GPUs torch's `index_add_` adds with atomics, in whatever order they come; its accumulating `index_put_` sorts the
    places first, and is what its deterministic mode puts in the other's place. On CPUs it is the other way round.
    """
    if total.device.type == "cpu":
        return total.index_add_(0, place, rows)
    return total.index_put_((place,), rows, accumulate=True)


def with_slot(y: Tensor, ids: Tensor, slot: Tensor, basis: Tensor, factor: float) -> Tensor:
    """Return y [..., n] + f · B[:, ids]ᵀ P in y's dtype."""
    columns = slot.index_select(1, ids.reshape(-1)).t()
    result = y.clone(memory_format=torch.contiguous_format)
    add_product_(result.view(-1, result.shape[-1]), columns.to(y.dtype), basis, factor)
    return result


def slot_gradient(dy: Tensor, ids: Tensor, basis: Tensor, vocabulary: int, factor: float, padding: int) -> Tensor:
    """Return dB float32 [r, vocabulary], summed over all tokens in float32."""
    rows, flat = _flat(dy, ids, padding)
    projected = matmul(rows, basis.to(rows.dtype).t()).to(torch.float32)
    if factor != 1.0:
        projected.mul_(factor)
    summed = torch.zeros(vocabulary, len(basis), dtype=torch.float32, device=dy.device)
    return add_rows_(summed, flat, projected).t().contiguous()


def band_width(tokens: int) -> int:
    """Return how many columns of a table have their gradient added up at once."""
    return max(1, BAND // tokens)


def table_gradient(dy: Tensor, ids: Tensor, vocabulary: int, factor: float, padding: int) -> Tensor:
    """Return G [vocabulary, n] in dy's dtype, each row summed in float32 and rounded once."""
    rows, flat = _flat(dy, ids, -1)
    table = torch.zeros(vocabulary, rows.shape[1], dtype=dy.dtype, device=dy.device)
    if len(flat) == 0:
        return table
    ordered, order, place = _sorted(flat)
    width = band_width(len(flat))
    for part, given in zip(table.split(width, dim=1), rows.split(width, dim=1)):
        # An id's row is written as often as it has tokens, with the same values each time.
        part[ordered] = _summed(given, order, place, len(flat), factor).to(dy.dtype).index_select(0, place)
    if padding >= 0:
        table[padding].zero_()
    return table


def token_rows(dy: Tensor, ids: Tensor, factor: float, padding: int) -> tuple[Tensor, Tensor]:
    """Return (float32 [tokens, n], ids [tokens]): what each token adds to the row of G of its id."""
    rows, flat = _flat(dy, ids, padding)
    rows = rows.to(torch.float32)
    return (rows if factor == 1.0 else rows * factor), flat


def compact_gradient(dy: Tensor, ids: Tensor, factor: float, padding: int, least_rows: int) -> Tensor:
    """Return the rows of G that are not zero, float32 [max(tokens, least_rows), n]; the rest of them is zero.

    It has the row space and the singular values of G [V, n]. As many rows as tokens: how many ids are distinct is
    known to the device only.
    """
    rows, flat = _flat(dy, ids, padding)
    _, order, place = _sorted(flat)
    return _summed(rows, order, place, max(len(flat), least_rows), factor)


def _sorted(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids in ascending order, where each of them was, and how many distinct ones there are before it."""
    # Stable: equal ids keep their order.
    ordered, order = ids.sort(stable=True)
    first = torch.ones_like(ordered)
    first[1:] = ordered[1:] != ordered[:-1]
    return ordered, order, first.cumsum(0) - 1


def _summed(rows: Tensor, order: Tensor, place: Tensor, count: int, factor: float) -> Tensor:
    """Return float32 [count, width] with row order[i] of `rows`, times the factor, added to row place[i]."""
    summands = rows.index_select(0, order).to(torch.float32)
    if factor != 1.0:
        summands.mul_(factor)
    total = torch.zeros(count, rows.shape[1], dtype=torch.float32, device=rows.device)
    return add_rows_(total, place, summands)
