"""The embedding whose table's gradient is formed in a basis only, in plain PyTorch.

    y = f · (E[ids] + B[:, ids]ᵀ P)      E [V, n], P [r, n], B [r, V], f a constant of the model
    dB[:, id] += f · P dy                summed over the tokens of each id: exactly P Gᵀ for G [V, n]

Tokens are projected before they are scattered: G never exists, and what is scattered is r wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.ops.lowrank_linear.products import matmul


def _flat(dy: Tensor, ids: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Return (dy [tokens, n], ids [tokens]), the rows of the padding id zero; -1 stands for no padding."""
    rows, flat = dy.reshape(-1, dy.shape[-1]), ids.reshape(-1)
    if padding >= 0:
        rows = rows.masked_fill((flat == padding).unsqueeze(1), 0.0)
    return rows, flat


def slot_gradient(dy: Tensor, ids: Tensor, basis: Tensor, vocabulary: int, factor: float, padding: int) -> Tensor:
    """Return dB float32 [r, vocabulary], summed over all tokens in float32."""
    rows, flat = _flat(dy, ids, padding)
    projected = matmul(rows, basis.to(rows.dtype).t()).to(torch.float32)
    summed = torch.zeros(vocabulary, len(basis), dtype=torch.float32, device=dy.device)
    return summed.index_add_(0, flat, projected, alpha=factor).t().contiguous()


def compact_gradient(dy: Tensor, ids: Tensor, factor: float, padding: int, least_rows: int) -> Tensor:
    """Return the rows of G that are not zero, float32 [max(tokens, least_rows), n]; the rest of them is zero.

    It has the row space and the singular values of G [V, n]. As many rows as tokens: how many ids are distinct is
    known to the device only.
    """
    rows, flat = _flat(dy, ids, padding)
    ordered, order = flat.sort()
    first = torch.ones_like(ordered)
    first[1:] = ordered[1:] != ordered[:-1]
    place = first.cumsum(0) - 1
    compact = torch.zeros(max(len(flat), least_rows), rows.shape[1], dtype=torch.float32, device=dy.device)
    return compact.index_add_(0, place, rows.index_select(0, order).to(torch.float32), alpha=factor)
