"""Cross entropy of an output layer without its logits: contract, checks and autograd.

Neither the logits [tokens, V] nor, for a frozen head or one with a low-rank slot, a gradient [V, n] ever exists; a
chunk of `chunk_rows` rows takes 6 · chunk_rows · V bytes, about 200 MB at 256 rows and a vocabulary of 128 k. Logits
are formed a second time for the gradient of a 16-bit weight that trains in full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops.autocast import autocast_dtype, no_autocast
from lisa_kernels.ops.linear_cross_entropy.reference import (
    NO_LABEL,
    Curve,
    Gradients,
    Head,
    HeadGradient,
    chunk_loss,
    logits_of,
    spans,
)
from lisa_kernels.ops.resting import RestingWeight
from lisa_kernels.ops.tiles import to_device
from lisa_kernels.uncompiled import uncompiled

__all__ = ["CHUNK_ROWS", "LOSS_NODE", "Curve", "Head", "HeadGradient", "linear_cross_entropy", "logits_of"]

CHUNK_ROWS = 256

Refresh = Callable[[HeadGradient], Tensor]


def _zeros(like: Tensor | None, wanted: bool) -> Tensor | None:
    return torch.zeros_like(like, dtype=torch.float32) if wanted and like is not None else None


@torch.library.custom_op("lisa_kernels::counted_rows", mutates_args=())
def _counted_rows(labels: Tensor, ignored: int) -> Tensor:
    return (labels != ignored).nonzero().squeeze(1)


@_counted_rows.register_fake
def _(labels: Tensor, ignored: int) -> Tensor:
    # All of them: what a plan must hold room for.
    return torch.empty_like(labels, dtype=torch.int64)


def _select(rows: Tensor, labels: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """Return rows and labels on the rows' device: of labels on the CPU those that count, of others all of them.

    How many rows on a GPU count is not asked: the host would wait for the whole forward. A plan's labels are taken for
    a CPU's, whose copy of rows makes it hold room for both.
    """
    if labels.device.type in ("cpu", "meta"):
        kept = _counted_rows(labels, ignored)
        if kept.numel() < labels.numel():
            rows, labels = rows.index_select(0, to_device(kept, rows.device)), labels.index_select(0, kept)
        labels = to_device(labels, rows.device)
    return rows, labels.masked_fill(labels == ignored, NO_LABEL)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, slot: Tensor | None, head: Head,
        labels: Tensor, chunk_rows: int, refresh: Refresh | None, graded: bool,
    ) -> Tensor:  # fmt: skip
        # Which says what requires a gradient where gradients are off, too.
        needs_rows, needs_weight, needs_bias, needs_slot, *_ = (graded and each for each in ctx.needs_input_grad)
        if weight is not None:
            # Under autocast the weight is narrowed here, once, and its gradient is in its own dtype all the same.
            head = head._replace(weight=weight.to(rows.dtype))
        hidden = torch.empty_like(rows) if needs_rows else None
        # In float32 the weight's gradient is summed on the way, in the memory that it will have anyway.
        dtype = None if weight is None else weight.dtype
        dweight = _zeros(weight, needs_weight and rows.dtype == dtype == torch.float32)
        dbias = _zeros(bias, needs_bias)
        dslot = _zeros(slot, needs_slot and refresh is None)
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        total = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        for span in spans(len(rows), chunk_rows):
            gradients = Gradients(None if hidden is None else hidden[span], dweight, dbias, dslot)
            part, total[span] = chunk_loss(rows[span], labels[span], head, gradients)
            loss += part
        if needs_slot and refresh is not None:
            gradient = HeadGradient(rows, labels, head, total, chunk_rows)
            dslot = gradient.project(refresh(gradient)).mul_(head.scale)
        ctx.save_for_backward(hidden, dbias, dslot, *((rows, labels, total, head.weight) if needs_weight else ()))
        ctx.head, ctx.dweight = head if needs_weight else None, dweight
        ctx.settings = (chunk_rows, dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, dbias, dslot, *others = ctx.saved_tensors
        chunk_rows, weight_dtype, bias_dtype = ctx.settings
        dweight, ctx.dweight = ctx.dweight, None
        if dweight is not None:
            dweight.mul_(dloss)
        elif others:
            rows, labels, total, _ = others
            gradient = HeadGradient(rows, labels, ctx.head, total, chunk_rows)
            with no_autocast(rows.device.type):
                dweight = gradient.whole(dloss, weight_dtype)
        drows = None if hidden is None else (hidden * dloss).to(hidden.dtype)
        dbias = None if dbias is None else (dbias * dloss).to(bias_dtype)
        return drows, dweight, dbias, (None if dslot is None else dslot * dloss), *[None] * 5


# What autograd calls the node of this loss.
LOSS_NODE = f"{_LinearCrossEntropy.__name__}Backward"


@uncompiled
def linear_cross_entropy(
    hidden: Tensor, head: Head, labels: Tensor, *, ignore_index: int = -100, chunk_rows: int = CHUNK_ROWS,
    refresh: Refresh | None = None,
) -> Tensor:  # fmt: skip
    """Return the sum of the cross entropies of `hidden` [..., n] through `head` against `labels` [...], float32 0-d.

    Rows whose label is `ignore_index` count for nothing: of labels on the CPU, wherever the head is, they are dropped
    before it; elsewhere they go through it, for to drop them the host would have to wait. Gradients: hidden, and of the
    head's weight, bias and slot those that require one. `refresh`: is given products with the head's gradient before
    the slot's is formed and returns the basis P [r, n] of that; the slot must then be zero. Divide by the number of
    labels that count for the mean. Where gradients are off none is formed and no basis is asked for. Runs uncompiled
    in a compiled model.
    """
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != head.weight.shape[1]:
        raise InputError(
            f"hidden is {list(hidden.shape)} and labels {list(labels.shape)}; a head of {list(head.weight.shape)} "
            f"takes hidden [..., {head.weight.shape[1]}] with one label per row."
        )
    weight = None if isinstance(head.weight, RestingWeight) else head.weight
    if (head.slot is None) != (head.basis is None):
        raise InputError("a slot without a basis, or a basis without a slot, was given; both or neither are wanted.")
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    rows, flat = _select(rows, flat, ignore_index)
    rows = rows.to(autocast_dtype(rows.device.type) or rows.dtype)
    with no_autocast(rows.device.type):
        loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            rows, weight, head.bias, head.slot, head, flat, chunk_rows, refresh, torch.is_grad_enabled()
        )
    return loss
