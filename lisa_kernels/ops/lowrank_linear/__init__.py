"""A linear layer with a low-rank slot beside its weight: contract, autograd and `torch.library` schema.

What a low-rank layer keeps for its backward is x Pᵀ [tokens, r] in place of x [tokens, n], and the full gradient
[m, n] is never formed. Where the basis trains as well (LoRA) x is kept beside it. `capture_linear` keeps x for one
backward, when a basis is due; `linear` is the same layer without a slot, frozen or trained in full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lisa_kernels.ops.autocast import as_autocast, no_autocast
from lisa_kernels.ops.lowrank_linear import reference
from lisa_kernels.ops.lowrank_linear.capture import Choose, bias_gradient, gradients, number_of, numbered_capture
from lisa_kernels.ops.lowrank_linear.products import is_slow

__all__ = ["DEFINITIONS", "capture_linear", "linear", "lowrank_linear", "number_of"]


def _forward_definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, basis: Tensor, scale: float, slot_is_zero: bool
) -> tuple[Tensor, Tensor]:
    with no_autocast(x.device.type):
        return reference.forward(x, weight, bias, slot, basis, scale, slot_is_zero)


_lowrank_linear = torch.library.custom_op("lisa_kernels::lowrank_linear", _forward_definition, mutates_args=())


@_lowrank_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, basis: Tensor, scale: float, slot_is_zero: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((*x.shape[:-1], basis.shape[0]))


def _backward_definition(
    dy: Tensor,
    weight: Tensor,
    projected: Tensor,
    slot: Tensor | None,
    basis: Tensor | None,
    scale: float,
    needs_dx: bool,
    x: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    with no_autocast(dy.device.type):
        through = None if slot is None or not (needs_dx or x is not None) else reference.through(dy, slot)
        dp = dy.new_empty((0,))
        if x is not None and through is not None:
            dp = reference.basis_gradient(through, x, scale)
        dx = reference.input_gradient(dy, weight, through, basis, scale) if needs_dx else dy.new_empty((0,))
        return dx, reference.slot_gradient(dy, projected, scale), dp


_lowrank_linear_backward = torch.library.custom_op(
    "lisa_kernels::lowrank_linear_backward", _backward_definition, mutates_args=()
)


@_lowrank_linear_backward.register_fake
def _(
    dy: Tensor,
    weight: Tensor,
    projected: Tensor,
    slot: Tensor | None,
    basis: Tensor | None,
    scale: float,
    needs_dx: bool,
    x: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = dy.new_empty((*dy.shape[:-1], weight.shape[1]) if needs_dx else (0,))
    dp = dy.new_empty((0,)) if x is None else dy.new_empty((projected.shape[-1], x.shape[-1]), dtype=torch.float32)
    return dx, dy.new_empty((projected.shape[-1], weight.shape[0]), dtype=torch.float32), dp


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, slot, basis, scale, slot_is_zero = inputs
    kept = x if ctx.needs_input_grad[4] and not slot_is_zero else None
    ctx.save_for_backward(weight, output[1], None if slot_is_zero else slot, None if slot_is_zero else basis, kept)
    ctx.scale = scale
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    weight, projected, slot, basis, x = ctx.saved_tensors
    needs_dx, _, needs_bias, *_ = ctx.needs_input_grad
    dx, db, dp = _lowrank_linear_backward(dy, weight, projected, slot, basis, ctx.scale, needs_dx, x)
    dbias = bias_gradient(dy, ctx.bias_dtype) if needs_bias else None
    return (dx if needs_dx else None), None, dbias, db, (None if x is None else dp), None, None


_lowrank_linear.register_autograd(_backward, setup_context=_setup_context)


def lowrank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, basis: Tensor,
    scale: float = 1.0, slot_is_zero: bool = False,
) -> Tensor:  # fmt: skip
    """Return y = x Wᵀ + b + scale · (x Pᵀ) B with gradients for x, the bias, the slot B and a basis that trains.

    x: [..., n]; weight W: [m, n], frozen; bias: [m] or None; slot B: float32 [r, m]; basis P: [r, n] in the weight's
    dtype, or float32 where it requires a gradient. `slot_is_zero` promises that B is zero now and saves its product; P
    then gets no gradient. Keeps x Pᵀ for the backward, and x where P requires a gradient.
    """
    x_, weight_, bias_ = as_autocast(x, weight, bias)
    basis_ = basis if basis.requires_grad else as_autocast(x, basis)[1]
    y, _ = _lowrank_linear(x_, weight_, bias_, slot, basis_, scale, slot_is_zero)
    return y  # type: ignore[no-any-return]


class _CaptureLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        slot: Tensor,
        choose: Choose,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.choose = choose
        ctx.bias_dtype = None if bias is None else bias.dtype
        return reference.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_dx, _, needs_bias, needs_slot, _ = ctx.needs_input_grad
        dx, dslot = gradients(dy, x, weight, ctx.choose, needs_dx, needs_slot)
        dbias = bias_gradient(dy, ctx.bias_dtype) if needs_bias else None
        return dx, None, dbias, dslot, None


def capture_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, choose: Choose, number: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return y = x Wᵀ + b; the backward asks `choose(dY, x)` for a basis P [r, n] and gives dB = P Gᵀ for G = dYᵀ x.

    x: [tokens, n]; the slot B must be zero. `choose` decides whether G is ever formed; `number` is its own, by which a
    compiled model asks it.
    """
    x_, weight_, bias_ = as_autocast(x, weight, bias)
    if torch.compiler.is_compiling():
        assert number is not None
        return numbered_capture(x_, weight_, bias_, slot, number)  # type: ignore[no-any-return]
    return _CaptureLinear.apply(x_, weight_, bias_, slot, choose)  # type: ignore[no-any-return,no-untyped-call]


@torch.library.custom_op("lisa_kernels::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with no_autocast(x.device.type):
        return reference.linear(x, weight, bias)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("lisa_kernels::linear_backward", mutates_args=())
def _linear_backward(
    dy: Tensor, weight: Tensor, x: Tensor | None, needs_dx: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with no_autocast(dy.device.type):
        dx = reference.input_gradient(dy, weight, None, None, 1.0) if needs_dx else dy.new_empty((0,))
        dw = dy.new_empty((0,)) if x is None else reference.weight_gradient(dy, x, weight.dtype)
        return dx, dw


@_linear_backward.register_fake
def _(dy: Tensor, weight: Tensor, x: Tensor | None, needs_dx: bool) -> tuple[Tensor, Tensor]:
    dx = dy.new_empty((*dy.shape[:-1], weight.shape[1]) if needs_dx else (0,))
    return dx, dy.new_empty((0,) if x is None else tuple(weight.shape))


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, x = ctx.saved_tensors
    needs_dx, needs_dw, needs_bias = ctx.needs_input_grad
    dx, dw = _linear_backward(dy, weight, x, needs_dx)
    return (
        dx if needs_dx else None,
        dw if needs_dw else None,
        bias_gradient(dy, ctx.bias_dtype) if needs_bias else None,
    )


_linear.register_autograd(_linear_gradients, setup_context=_setup_linear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return y = x Wᵀ + b with gradients for all three, as `torch.nn.functional.linear` does, at a bearable speed.

    x: [..., n]; weight: [m, n]; bias: [m] or None. A frozen weight keeps nothing for the backward, one in training x.
    """
    x_, weight_, bias_ = as_autocast(x, weight, bias)
    if x_ is None or not is_slow(x_):
        return torch.nn.functional.linear(x_, weight_, bias_)  # type: ignore[arg-type]
    y: Tensor = _linear(x_, weight_, bias_)
    return y


# What these operations are made of: for a plan, to which they are one each otherwise, with nothing inside.
DEFINITIONS = {
    torch.ops.lisa_kernels.lowrank_linear.default: _forward_definition,
    torch.ops.lisa_kernels.lowrank_linear_backward.default: _backward_definition,
}
