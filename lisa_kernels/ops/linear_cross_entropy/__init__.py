"""Cross entropy of an output layer without its logits: contract, checks and autograd.

Neither the logits [tokens, V] nor, for a frozen head or one with a low-rank slot, a gradient [V, n] ever exists; a
chunk of `chunk_rows` rows takes 8 · chunk_rows · V bytes, about 131 MB at 128 rows and a vocabulary of 128 k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops.linear_cross_entropy.reference import Gradients, Head, chunk_loss

__all__ = ["CHUNK_ROWS", "Head", "linear_cross_entropy"]

CHUNK_ROWS = 256


def _zeros(like: Tensor | None, wanted: bool) -> Tensor | None:
    return torch.zeros_like(like, dtype=torch.float32) if wanted and like is not None else None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor | None, basis: Tensor | None,
        scale: float, labels: Tensor, chunk_rows: int,
    ) -> Tensor:  # fmt: skip
        head = Head(weight, bias, slot, basis, scale)
        needs_rows, needs_weight, needs_bias, needs_slot, *_ = ctx.needs_input_grad
        gradients = None
        if any(ctx.needs_input_grad):
            hidden = torch.empty_like(rows) if needs_rows else None
            others = (_zeros(weight, needs_weight), _zeros(bias, needs_bias), _zeros(slot, needs_slot))
            gradients = Gradients(hidden, *others)
            ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias, gradients.slot)
            ctx.dtypes = (rows.dtype, weight.dtype, None if bias is None else bias.dtype, torch.float32)
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        for at in range(0, len(rows), chunk_rows):
            span = slice(at, at + chunk_rows)
            loss = loss + chunk_loss(rows[span], labels[span], head, at, gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaled = [
            None if saved is None else (saved * dloss).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return (*scaled, None, None, None, None)


def linear_cross_entropy(
    hidden: Tensor, head: Head, labels: Tensor, *, ignore_index: int = -100, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Return the sum of the cross entropies of `hidden` [..., n] through `head` against `labels` [...], float32 0-d.

    Rows whose label is `ignore_index` are dropped before the head. Gradients: hidden, and of the head's weight, bias
    and slot those that require one. Divide by the number of labels that count for the mean.
    """
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != head.weight.shape[1]:
        raise InputError(
            f"hidden is {list(hidden.shape)} and labels {list(labels.shape)}; a head of {list(head.weight.shape)} "
            f"takes hidden [..., {head.weight.shape[1]}] with one label per row."
        )
    if (head.slot is None) != (head.basis is None):
        raise InputError("a slot without a basis, or a basis without a slot, was given; both or neither are wanted.")
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    kept = (flat != ignore_index).nonzero().squeeze(1)
    if kept.numel() < flat.numel():
        rows, flat = rows.index_select(0, kept), flat.index_select(0, kept)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, head.weight, head.bias, head.slot, head.basis, head.scale, flat, chunk_rows
    )
    return loss
