"""The weight of a low-rank layer for code that multiplies by it past the layer: its gradient goes to the slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.ops.autocast import no_autocast
from lisa_kernels.uncompiled import uncompiled


class _WholeWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, slot: Tensor, basis: Tensor, scale: float, slot_is_zero: bool,
        choose: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:  # fmt: skip
        trains = ctx.needs_input_grad[2] and not slot_is_zero
        ctx.save_for_backward(*([] if choose is not None else [basis, slot] if trains else [basis]))
        ctx.scale, ctx.choose = scale, choose
        if slot_is_zero:
            return weight.view_as(weight)
        with no_autocast(weight.device.type):
            return (weight.to(slot.dtype) + scale * (slot.t() @ basis.to(slot.dtype))).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with no_autocast(gradient.device.type):
            whole = gradient.to(torch.float32)
            basis, *slot = ctx.saved_tensors if ctx.choose is None else [ctx.choose(whole)]
            dslot = ctx.scale * (basis.to(torch.float32) @ whole.t())
            dbasis = ctx.scale * (slot[0] @ whole) if slot else None
        return None, dslot, dbasis, None, None, None


@uncompiled
def whole_weight(
    weight: Tensor, slot: Tensor, basis: Tensor, scale: float = 1.0, slot_is_zero: bool = False,
    choose: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return W + scale · Bᵀ P [m, n] in the weight's dtype, whose gradient G gives dB = scale · P Gᵀ.

    A basis that requires a gradient gets dP = scale · B G.

    weight W: [m, n], frozen; slot B: float32 [r, m]; basis P: [r, n]. `slot_is_zero` promises that B is zero now: a
    view of W is returned. `choose(G)`: asked for the basis in the backward, where one is due. Whoever multiplies by the
    result forms G [m, n] whole, which the layer's own forward never does.
    """
    return _WholeWeight.apply(weight, slot, basis, scale, slot_is_zero, choose)  # type: ignore[no-any-return,no-untyped-call]
