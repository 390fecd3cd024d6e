"""An embedding with a low-rank slot beside its table, or a table that trains: contract, autograd, `torch.library`.

The lookup itself stays the model's own; what it returns passes through here, is given what a slot that accumulates has
learnt, and takes the slot's gradient along. Saved for the backward are the ids and the basis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.ops.lowrank_embedding import reference
from lisa_kernels.uncompiled import uncompiled

__all__ = ["DEFINITIONS", "capture_embedding", "lowrank_embedding", "ordered_embedding"]


def _forward_definition(
    y: Tensor, ids: Tensor, slot: Tensor, basis: Tensor, factor: float, padding: int, slot_is_zero: bool
) -> Tensor:
    return y.clone() if slot_is_zero else reference.with_slot(y, ids, slot, basis, factor)


_lowrank_embedding = torch.library.custom_op("lisa_kernels::lowrank_embedding", _forward_definition, mutates_args=())


@_lowrank_embedding.register_fake
def _(y: Tensor, ids: Tensor, slot: Tensor, basis: Tensor, factor: float, padding: int, slot_is_zero: bool) -> Tensor:
    return torch.empty_like(y)


def _backward_definition(
    dy: Tensor, ids: Tensor, basis: Tensor, vocabulary: int, factor: float, padding: int
) -> Tensor:
    return reference.slot_gradient(dy, ids, basis, vocabulary, factor, padding)


_lowrank_embedding_backward = torch.library.custom_op(
    "lisa_kernels::lowrank_embedding_backward", _backward_definition, mutates_args=()
)


@_lowrank_embedding_backward.register_fake
def _(dy: Tensor, ids: Tensor, basis: Tensor, vocabulary: int, factor: float, padding: int) -> Tensor:
    return dy.new_empty((basis.shape[0], vocabulary), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, slot, basis, factor, padding, _ = inputs
    ctx.save_for_backward(ids, basis)
    ctx.settings = (slot.shape[1], factor, padding)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs_y, _, needs_slot, *_ = ctx.needs_input_grad
    ids, basis = ctx.saved_tensors
    dslot = _lowrank_embedding_backward(dy, ids, basis, *ctx.settings) if needs_slot else None
    return (dy if needs_y else None), None, dslot, None, None, None, None


_lowrank_embedding.register_autograd(_backward, setup_context=_setup_context)


def lowrank_embedding(
    y: Tensor, ids: Tensor, slot: Tensor, basis: Tensor, factor: float = 1.0, padding: int = -1,
    slot_is_zero: bool = True,
) -> Tensor:  # fmt: skip
    """Return y = factor · E[ids] as it was looked up, plus factor · B[:, ids]ᵀ P, with a gradient for the slot B.

    y: [..., n]; ids: integers [...]; slot: float32 [r, V]; basis P: [r, n]. Tokens of the id `padding` (-1: none) give
    no gradient. slot_is_zero promises that B is zero now, and saves the sum.
    """
    # Without its version: where the table is the head's too, that one may refresh the basis before this backward.
    result: Tensor = _lowrank_embedding(y, ids, slot, basis.data, factor, padding, slot_is_zero)
    return result


class _CaptureEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, ids: Tensor, slot: Tensor, on_gradient: Callable[..., Tensor], factor: float,
        padding: int, least_rows: int | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(ids)
        ctx.on_gradient, ctx.least_rows, ctx.settings = on_gradient, least_rows, (slot.shape[1], factor, padding)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        needs_y, _, needs_slot, *_ = ctx.needs_input_grad
        dslot = None
        if needs_slot:
            vocabulary, factor, padding = ctx.settings
            if ctx.least_rows is None:
                basis = ctx.on_gradient(*reference.token_rows(dy, ids, factor, padding))
            else:
                basis = ctx.on_gradient(reference.compact_gradient(dy, ids, factor, padding, ctx.least_rows))
            dslot = reference.slot_gradient(dy, ids, basis, vocabulary, factor, padding)
        return (dy if needs_y else None), None, dslot, None, None, None, None


@uncompiled
def capture_embedding(
    y: Tensor, ids: Tensor, slot: Tensor, on_gradient: Callable[..., Tensor], factor: float = 1.0,
    padding: int = -1, least_rows: int | None = 0,
) -> Tensor:  # fmt: skip
    """Return y as `lowrank_embedding` does; the backward asks `on_gradient` for a basis P and gives dB = P Gᵀ.

    `on_gradient` takes the rows of G that are not zero, float32 [max(tokens, least_rows), n], and returns [r, n]. With
    least_rows=None it takes each token's row, float32 [tokens, n], and the tokens' ids [tokens] instead, from which it
    is known where in G they belong. Runs uncompiled in a compiled model.
    """
    result: Tensor = _CaptureEmbedding.apply(  # type: ignore[no-untyped-call]
        y, ids, slot, on_gradient, factor, padding, least_rows
    )
    return result


# One operation to a compiler, which would copy the whole table for each band that is written into it.
_table_gradient = torch.library.custom_op("lisa_kernels::table_gradient", reference.table_gradient, mutates_args=())


@_table_gradient.register_fake
def _(dy: Tensor, ids: Tensor, vocabulary: int, factor: float, padding: int) -> Tensor:
    return dy.new_empty((vocabulary, dy.shape[-1]))


class _OrderedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ids: Tensor, table: Tensor, factor: float, padding: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.settings = (len(table), factor, padding)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        return None, None, _table_gradient(dy, ids, *ctx.settings), None, None


def ordered_embedding(y: Tensor, ids: Tensor, table: Tensor, factor: float = 1.0, padding: int = -1) -> Tensor:
    """Return y = factor · E[ids] as it was looked up, with the gradient of the table E.

    y: [..., n] in no graph; ids: integers [...]; table: [V, n]. The tokens of an id are added in float32 and in their
    order; those of the id `padding` (-1: none) give no gradient.
    """
    result: Tensor = _OrderedEmbedding.apply(y, ids, table, factor, padding)  # type: ignore[no-untyped-call]
    return result


# What these operations are made of: for a plan, to which they are one each otherwise, with nothing inside.
DEFINITIONS = {
    torch.ops.lisa_kernels.lowrank_embedding.default: _forward_definition,
    torch.ops.lisa_kernels.lowrank_embedding_backward.default: _backward_definition,
}
