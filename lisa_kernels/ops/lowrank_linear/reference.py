"""The linear layer whose weight gradient is formed in a basis only, in plain PyTorch.

    y = x Wᵀ + b + s · (x Pᵀ) B          W [m, n], P [r, n], B [r, m]
    dB = s · (x Pᵀ)ᵀ dY                  with P's rows orthonormal and s = 1: exactly P Gᵀ for G = dYᵀ x
    dX = dY W + s · dY Bᵀ P
    dP = s · (dY Bᵀ)ᵀ x                  where the basis trains too (LoRA)

A weight stored transposed [n, m] (GPT-2's Conv1D) is the same layer read through `weight.t()`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.ops.lowrank_linear.products import is_slow, matmul, sum_of_outer_products, weight_gradient_in


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + b [..., m]."""
    if not is_slow(x):
        return torch.nn.functional.linear(x, weight, bias)
    y = matmul(x, weight.t())
    return y if bias is None else y.add_(bias)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, basis: Tensor, scale: float, slot_is_zero: bool
) -> tuple[Tensor, Tensor]:
    """Return (y [..., m], x Pᵀ [..., r]); a slot known to be zero costs nothing."""
    projected = matmul(x, basis.t().to(x.dtype))
    y = linear(x, weight, bias)
    if not slot_is_zero:
        # The scale goes where there are r numbers a token, not m.
        y += (_scaled(projected.to(slot.dtype), scale) @ slot).to(y.dtype)
    return y, projected


def _scaled(values: Tensor, scale: float) -> Tensor:
    return values if scale == 1.0 else values * scale


def input_gradient(dy: Tensor, weight: Tensor, slot: Tensor | None, basis: Tensor | None, scale: float) -> Tensor:
    """Return dX [..., n]; `slot` and `basis` are None where the slot is zero."""
    dx = matmul(dy, weight)
    if slot is not None and basis is not None:
        dx += matmul(_scaled(matmul(dy, slot.t().to(dy.dtype)), scale), basis.to(dy.dtype))
    return dx


def slot_gradient(dy: Tensor, projected: Tensor, scale: float) -> Tensor:
    """Return dB float32 [r, m], summed over all tokens in float32."""
    gradient = sum_of_outer_products(projected, dy)
    return gradient if scale == 1.0 else gradient.mul_(scale)


def basis_gradient(dy: Tensor, x: Tensor, slot: Tensor, scale: float) -> Tensor:
    """Return dP float32 [r, n], summed over all tokens in float32."""
    gradient = sum_of_outer_products(matmul(dy, slot.t().to(dy.dtype)), x)
    return gradient if scale == 1.0 else gradient.mul_(scale)


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the full gradient G = dYᵀ x [m, n] in `dtype`, summed in float32."""
    return sum_of_outer_products(dy, x) if dtype == torch.float32 else weight_gradient_in(dtype, dy, x)
