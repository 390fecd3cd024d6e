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

from lisa_kernels.ops.lowrank_linear.products import (
    add_product_,
    is_slow,
    matmul,
    sum_of_outer_products,
    weight_gradient_in,
)


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
        add_product_(y, projected, slot, scale)
    return y, projected


def input_gradient(
    dy: Tensor, weight: Tensor, through_slot: Tensor | None, basis: Tensor | None, scale: float
) -> Tensor:  # fmt: skip
    """Return dX [..., n]; through_slot is dY Bᵀ [..., r], and it and `basis` are None where the slot is zero."""
    dx = matmul(dy, weight)
    if through_slot is not None and basis is not None:
        add_product_(dx, through_slot, basis, scale)
    return dx


def through(dy: Tensor, slot: Tensor) -> Tensor:
    """Return dY Bᵀ [..., r]."""
    return matmul(dy, slot.t().to(dy.dtype))


def slot_gradient(dy: Tensor, projected: Tensor, scale: float) -> Tensor:
    """Return dB float32 [r, m], summed over all tokens in float32."""
    gradient = sum_of_outer_products(projected, dy)
    return gradient if scale == 1.0 else gradient.mul_(scale)


def basis_gradient(through_slot: Tensor, x: Tensor, scale: float) -> Tensor:
    """Return dP float32 [r, n] for dY Bᵀ [..., r], summed over all tokens in float32."""
    gradient = sum_of_outer_products(through_slot, x)
    return gradient if scale == 1.0 else gradient.mul_(scale)


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the full gradient G = dYᵀ x [m, n] in `dtype`, summed in float32."""
    return sum_of_outer_products(dy, x) if dtype == torch.float32 else weight_gradient_in(dtype, dy, x)
