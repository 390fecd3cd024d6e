"""A linear layer whose weight rests in 8 or 4 bits, with or without a low-rank slot: contract, autograd and schema.

    y = x Ŵᵀ + b + s · (x Pᵀ) B          Ŵ [m, n]: what the codes mean, in x's dtype
    dX = dY Ŵ + s · dY Bᵀ P,  dB = s · (x Pᵀ)ᵀ dY,  dP = s · (dY Bᵀ)ᵀ x  (where the basis trains)

The weight is decoded in the forward and once more in the backward, a tile of rows at a time, and is gone at the end of
each: what is kept are the codes, which nobody changes, and x Pᵀ, with x where the basis trains. So one tile in 16 bits
exists at a time, whatever the depth of the model and the size of its vocabulary. A dX of several tiles is summed in
float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lisa_kernels.ops.autocast import as_autocast, no_autocast
from lisa_kernels.ops.lowrank_linear import reference
from lisa_kernels.ops.lowrank_linear.capture import Choose, bias_gradient, slot_gradient_in_new_basis
from lisa_kernels.ops.lowrank_linear.products import add_product_, matmul
from lisa_kernels.ops.resting import RestingWeight

__all__ = ["DEFINITIONS", "capture_resting_linear", "linear_with", "resting_linear", "times"]


def linear_with(weight: RestingWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Ŵᵀ + b [..., m] in x's dtype."""
    y = None
    for rows, part in weight.tiles(x.dtype):
        y_part = reference.linear(x, part, None if bias is None else bias[rows])
        if len(part) == weight.m:
            return y_part
        y = x.new_empty((*x.shape[:-1], weight.m)) if y is None else y
        y[..., rows] = y_part
    assert y is not None
    return y


def times(dy: Tensor, weight: RestingWeight) -> Tensor:
    """Return dY Ŵ [..., n] in dy's dtype."""
    total = None
    for rows, part in weight.tiles(dy.dtype):
        dx_part = matmul(dy[..., rows], part)
        if len(part) == weight.m:
            return dx_part
        total = dx_part.to(torch.float32) if total is None else total.add_(dx_part)
    assert total is not None
    return total.to(dy.dtype)


def forward_definition(
    x: Tensor, codes: Tensor, scales: Tensor, kind: str, m: int, bias: Tensor | None, slot: Tensor | None,
    basis: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with no_autocast(x.device.type):
        weight = RestingWeight(codes, scales, kind, m, x.shape[-1])
        if slot is None or basis is None:
            return linear_with(weight, x, bias), x.new_empty((0,))
        projected = matmul(x, basis.t().to(x.dtype))
        y = linear_with(weight, x, bias)
        add_product_(y, projected, slot, scale)
        return y, projected


_resting_linear = torch.library.custom_op("lisa_kernels::resting_linear", forward_definition, mutates_args=())


@_resting_linear.register_fake
def _(
    x: Tensor, codes: Tensor, scales: Tensor, kind: str, m: int, bias: Tensor | None, slot: Tensor | None,
    basis: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kept = (0,) if basis is None else (*x.shape[:-1], basis.shape[0])
    return x.new_empty((*x.shape[:-1], m)), x.new_empty(kept)


def backward_definition(
    dy: Tensor, codes: Tensor, scales: Tensor, kind: str, n: int, projected: Tensor, slot: Tensor | None,
    basis: Tensor | None, scale: float, needs_dx: bool, x: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with no_autocast(dy.device.type):
        dx, dslot, dbasis = (dy.new_empty((0,)) for _ in range(3))
        if slot is not None:
            dslot = reference.slot_gradient(dy, projected, scale)
        if needs_dx:
            dx = times(dy, RestingWeight(codes, scales, kind, dy.shape[-1], n))
        if slot is not None and (needs_dx or x is not None):
            through = reference.through(dy, slot)
            if needs_dx and basis is not None:
                add_product_(dx, through, basis, scale)
            if x is not None:
                dbasis = reference.basis_gradient(through, x, scale)
        return dx, dslot, dbasis


_resting_linear_backward = torch.library.custom_op(
    "lisa_kernels::resting_linear_backward", backward_definition, mutates_args=()
)


@_resting_linear_backward.register_fake
def _(
    dy: Tensor, codes: Tensor, scales: Tensor, kind: str, n: int, projected: Tensor, slot: Tensor | None,
    basis: Tensor | None, scale: float, needs_dx: bool, x: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dslot = dy.new_empty((0,)) if slot is None else dy.new_empty(tuple(slot.shape), dtype=torch.float32)
    dbasis = dy.new_empty((0,)) if x is None else dy.new_empty((projected.shape[-1], n), dtype=torch.float32)
    return dy.new_empty((*dy.shape[:-1], n) if needs_dx else (0,)), dslot, dbasis


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codes, scales, kind, _, bias, slot, basis, scale = inputs
    ctx.save_for_backward(codes, scales, output[1], slot, basis, x if ctx.needs_input_grad[7] else None)
    ctx.kind, ctx.columns, ctx.scale = kind, x.shape[-1], scale
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    codes, scales, projected, slot, basis, x = ctx.saved_tensors
    needs_dx, needs_bias, needs_slot = (ctx.needs_input_grad[place] for place in (0, 5, 6))
    dx, dslot, dbasis = _resting_linear_backward(
        dy, codes, scales, ctx.kind, ctx.columns, projected, slot, basis, ctx.scale, needs_dx, x
    )  # fmt: skip
    dbias = bias_gradient(dy, ctx.bias_dtype) if needs_bias else None
    return (
        dx if needs_dx else None, None, None, None, None, dbias, dslot if needs_slot else None,
        None if x is None else dbasis, None,
    )  # fmt: skip


_resting_linear.register_autograd(_backward, setup_context=_setup_context)


def resting_linear(
    x: Tensor, codes: Tensor, scales: Tensor, kind: str, rows: int, bias: Tensor | None, slot: Tensor | None = None,
    basis: Tensor | None = None, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Return y = x Ŵᵀ + b + s · (x Pᵀ) B with gradients for x, the bias, the slot B and a basis that trains.

    x: [..., n]; codes and scales: of a weight [rows, n], see `quantize_resting`; slot B: float32 [r, rows] with a basis
    P [r, n], float32 where it requires a gradient, or neither. Keeps x Pᵀ for the backward, x where P requires a
    gradient, and nothing of the weight.
    """
    x_, bias_ = as_autocast(x, bias)
    basis_ = basis if basis is None or basis.requires_grad else as_autocast(x, basis)[1]
    y, _ = _resting_linear(x_, codes, scales, kind, rows, bias_, slot, basis_, scale)
    return y  # type: ignore[no-any-return]


class _CaptureRestingLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, kind: str, rows: int, bias: Tensor | None, slot: Tensor,
        choose: Choose,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, codes, scales)
        ctx.kind, ctx.choose = kind, choose
        ctx.bias_dtype = None if bias is None else bias.dtype
        return linear_with(RestingWeight(codes, scales, kind, rows, x.shape[-1]), x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, codes, scales = ctx.saved_tensors
        needs_dx, needs_bias, needs_slot = (ctx.needs_input_grad[place] for place in (0, 5, 6))
        with no_autocast(dy.device.type):
            # The basis first: what it takes to find one is gone when dX comes.
            dslot = slot_gradient_in_new_basis(dy, x, ctx.choose) if needs_slot else None
            dx = times(dy, RestingWeight(codes, scales, ctx.kind, dy.shape[-1], x.shape[-1])) if needs_dx else None
        dbias = bias_gradient(dy, ctx.bias_dtype) if needs_bias else None
        return dx, None, None, None, None, dbias, dslot, None


def capture_resting_linear(
    x: Tensor, codes: Tensor, scales: Tensor, kind: str, rows: int, bias: Tensor | None, slot: Tensor, choose: Choose
) -> Tensor:  # fmt: skip
    """Return y = x Ŵᵀ + b; the backward asks `choose(dY, x)` for a basis P [r, n] and gives dB = P Gᵀ for G = dYᵀ x.

    x: [tokens, n]; the slot B must be zero.
    """
    x_, bias_ = as_autocast(x, bias)
    y: Tensor = _CaptureRestingLinear.apply(x_, codes, scales, kind, rows, bias_, slot, choose)  # type: ignore[no-untyped-call]
    return y


# What these operations are made of: for a plan, to which they are one each otherwise, with nothing inside.
DEFINITIONS = {
    torch.ops.lisa_kernels.resting_linear.default: forward_definition,
    torch.ops.lisa_kernels.resting_linear_backward.default: backward_definition,
}
