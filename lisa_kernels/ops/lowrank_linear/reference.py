"""The linear layer whose weight gradient is formed in a basis only, in plain PyTorch.

    y = x Wᵀ + b + s · (x Pᵀ) B          W [m, n], P [r, n], B [r, m]
    dB = s · (x Pᵀ)ᵀ dY                  with P's rows orthonormal and s = 1: exactly P Gᵀ for G = dYᵀ x
    dX = dY W + s · dY Bᵀ P

A weight stored transposed [n, m] (GPT-2's Conv1D) is the same layer read through `weight.t()`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right; on CPUs 16-bit operands are multiplied in float32.

    torch's own 16-bit `dY @ W` falls to a path of 0.2 GFLOP/s on CPUs without bfloat16 matrix units.
    """
    if left.device.type == "cpu" and left.dtype in (torch.bfloat16, torch.float16):
        return (left.to(torch.float32) @ right.to(torch.float32)).to(left.dtype)
    return left @ right


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, basis: Tensor, scale: float, slot_is_zero: bool
) -> tuple[Tensor, Tensor]:
    """Return (y [..., m], x Pᵀ [..., r]); a slot known to be zero costs nothing."""
    projected = x @ basis.t()
    y = torch.nn.functional.linear(x, weight, bias)
    if not slot_is_zero:
        y = y + (scale * (projected.to(slot.dtype) @ slot)).to(y.dtype)
    return y, projected


def input_gradient(dy: Tensor, weight: Tensor, slot: Tensor | None, basis: Tensor | None, scale: float) -> Tensor:
    """Return dX [..., n]; `slot` and `basis` are None where the slot is zero."""
    dx = matmul(dy, weight)
    if slot is not None and basis is not None:
        dx = dx + (scale * matmul(matmul(dy, slot.t().to(dy.dtype)), basis)).to(dx.dtype)
    return dx


def slot_gradient(dy: Tensor, projected: Tensor, scale: float) -> Tensor:
    """Return dB float32 [r, m], summed over all tokens in float32."""
    rows = projected.reshape(-1, projected.shape[-1])
    return scale * (rows.t().to(torch.float32) @ dy.reshape(-1, dy.shape[-1]).to(torch.float32))


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Return the full gradient G = dYᵀ x, float32 [m, n]: only ever formed for one matrix of a refresh."""
    return dy.reshape(-1, dy.shape[-1]).t().to(torch.float32) @ x.reshape(-1, x.shape[-1]).to(torch.float32)
