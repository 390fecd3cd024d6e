"""A linear layer whose resting weight is lent to it for each product, and may be elsewhere, or gone, between two.

The formulas and the products are those of `resting_linear`, to the bit. Nothing of the weight is kept for the backward,
not even a view: it asks for the weight anew, and so may find it in other memory. A compiled model runs this uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.ops.autocast import as_autocast, no_autocast
from lisa_kernels.ops.lowrank_linear.capture import Choose, bias_gradient, slot_gradient_in_new_basis
from lisa_kernels.ops.resting import RestingWeight
from lisa_kernels.ops.resting_linear import backward_definition, forward_definition, linear_with, times
from lisa_kernels.uncompiled import uncompiled

__all__ = ["Lend", "capture_lent_linear", "lent_linear"]

# What is queued inside may read the weight.
Lend = Callable[[], AbstractContextManager[RestingWeight]]


class _LentLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lend: Lend, bias: Tensor | None, slot: Tensor | None, basis: Tensor | None, scale: float
    ) -> Tensor:  # fmt: skip
        with lend() as weight:
            y, projected = forward_definition(x, *weight[:4], bias, slot, basis, scale)
        ctx.save_for_backward(projected, slot, basis, x if ctx.needs_input_grad[4] else None)
        ctx.lend, ctx.scale = lend, scale
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dy is None:
            return (None,) * 6
        projected, slot, basis, x = ctx.saved_tensors
        needs_dx, needs_bias, needs_slot = (ctx.needs_input_grad[place] for place in (0, 2, 3))
        beside = projected, slot, basis, ctx.scale, needs_dx, x
        if needs_dx:
            with ctx.lend() as weight:
                dx, dslot, dbasis = backward_definition(dy, weight.codes, weight.scales, weight.kind, weight.n, *beside)
        else:
            # No weight comes for a gradient that is not wanted.
            none = dy.new_empty((0,))
            dx, dslot, dbasis = backward_definition(dy, none, none, "", 0, *beside)
        dbias = bias_gradient(dy, ctx.bias_dtype) if needs_bias else None
        return (
            dx if needs_dx else None, None, dbias, dslot if needs_slot else None, None if x is None else dbasis, None,
        )  # fmt: skip


class _CaptureLentLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lend: Lend, bias: Tensor | None, slot: Tensor, choose: Choose) -> Tensor:
        ctx.save_for_backward(x)
        ctx.lend, ctx.choose = lend, choose
        ctx.bias_dtype = None if bias is None else bias.dtype
        with lend() as weight:
            return linear_with(weight, x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        needs_dx, needs_bias, needs_slot = (ctx.needs_input_grad[place] for place in (0, 2, 3))
        dx = None
        with no_autocast(dy.device.type):
            # The basis first: what it takes to find one is gone when dX comes.
            dslot = slot_gradient_in_new_basis(dy, x, ctx.choose) if needs_slot else None
            if needs_dx:
                with ctx.lend() as weight:
                    dx = times(dy, weight)
        dbias = bias_gradient(dy, ctx.bias_dtype) if needs_bias else None
        return dx, None, dbias, dslot, None


@uncompiled
def lent_linear(
    x: Tensor, lend: Lend, bias: Tensor | None, slot: Tensor | None = None, basis: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Return y = x Ŵᵀ + b + s · (x Pᵀ) B with the gradients that `resting_linear` gives."""
    x_, bias_ = as_autocast(x, bias)
    basis_ = basis if basis is None or basis.requires_grad else as_autocast(x, basis)[1]
    y: Tensor = _LentLinear.apply(x_, lend, bias_, slot, basis_, scale)  # type: ignore[no-untyped-call]
    return y


@uncompiled
def capture_lent_linear(x: Tensor, lend: Lend, bias: Tensor | None, slot: Tensor, choose: Choose) -> Tensor:
    """Return y = x Ŵᵀ + b; the backward finds a basis for the slot, which is zero; see `capture_resting_linear`."""
    x_, bias_ = as_autocast(x, bias)
    y: Tensor = _CaptureLentLinear.apply(x_, lend, bias_, slot, choose)  # type: ignore[no-untyped-call]
    return y
