"""The layer whose backward finds a basis, as operations that a compiled model holds: whom it asks is data, not code.

A compiled graph cannot call a method of a layer. It is given a number, as a tensor of the host, by which the operation
finds the method when the backward runs; so layers that find bases share a graph, and it is compiled once.
"""

from __future__ import annotations

import itertools
import weakref
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops.autocast import no_autocast
from lisa_kernels.ops.lowrank_linear import reference
from lisa_kernels.ops.lowrank_linear.products import matmul

Choose = Callable[[Tensor, Tensor], Tensor]

_numbers = itertools.count(1)
_methods: dict[int, weakref.WeakMethod[Choose]] = {}


def number_of(choose: Choose) -> Tensor:
    """Return the number, int64 [1] on the host, of a method `choose(dY, x)` of a layer, for as long as the layer is."""
    number = next(_numbers)
    _methods[number] = weakref.WeakMethod(choose, lambda _: _methods.pop(number, None))
    # Made by no operation: a plan counts those of a device, and here the host may be it.
    return torch.frombuffer(array("q", [number]), dtype=torch.int64)


def slot_gradient_in_new_basis(dy: Tensor, x: Tensor, choose: Choose) -> Tensor:
    """Return dB = P Gᵀ for G = dYᵀ x, of the basis P that `choose(dY, x)` gives."""
    basis = choose(dy, x)
    return reference.slot_gradient(dy, matmul(x, basis.t().to(x.dtype)), 1.0)


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, choose: Choose, needs_dx: bool, needs_slot: bool
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return dX and dB = P Gᵀ for G = dYᵀ x, of the basis P that `choose(dY, x)` gives; None for what is not wanted."""
    with no_autocast(dy.device.type):
        # The basis first: what it takes to find one is gone when dX comes.
        dslot = slot_gradient_in_new_basis(dy, x, choose) if needs_slot else None
        dx = reference.input_gradient(dy, weight, None, None, 1.0) if needs_dx else None
    return dx, dslot


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over tokens, taken in float32."""
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(dtype)


@torch.library.custom_op("lisa_kernels::capture_linear", mutates_args=())
def numbered_capture(x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, number: Tensor) -> Tensor:
    """Return y = x Wᵀ + b; the backward asks the method of that number for a basis."""
    with no_autocast(x.device.type):
        return reference.linear(x, weight, bias)


@numbered_capture.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, number: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("lisa_kernels::capture_linear_backward", mutates_args=())
def _numbered_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, number: Tensor, rank: int, needs_dx: bool, needs_slot: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    method = _methods.get(int(number))
    choose = None if method is None else method()
    if choose is None:
        raise InputError("a compiled backward asks for a basis of a layer that is gone; attach the model again.")
    dx, dslot = gradients(dy, x, weight, choose, needs_dx, needs_slot)
    nothing = dy.new_empty((0,))
    return nothing if dx is None else dx, nothing.clone() if dslot is None else dslot


@_numbered_gradients.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, number: Tensor, rank: int, needs_dx: bool, needs_slot: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx = dy.new_empty((*dy.shape[:-1], weight.shape[1]) if needs_dx else (0,))
    dslot = dy.new_empty((rank, weight.shape[0]), dtype=torch.float32) if needs_slot else dy.new_empty((0,))
    return dx, dslot


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, slot, number = inputs
    ctx.save_for_backward(x, weight, number)
    ctx.rank, ctx.bias_dtype = slot.shape[0], None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, number = ctx.saved_tensors
    needs_dx, _, needs_bias, needs_slot, _ = ctx.needs_input_grad
    dx, dslot = _numbered_gradients(dy, x, weight, number, ctx.rank, needs_dx, needs_slot)
    dbias = bias_gradient(dy, ctx.bias_dtype) if needs_bias else None
    return (dx if needs_dx else None), None, dbias, (dslot if needs_slot else None), None


numbered_capture.register_autograd(_backward, setup_context=_setup)
