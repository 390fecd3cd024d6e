"""R = P Gᵀ in plain PyTorch, a band of the gradient's rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of G that are held in float32 at a time.
BAND_ELEMENTS = 1 << 20


def project(basis: Tensor, gradient: Tensor) -> Tensor:
    """Return basis · gradientᵀ in float32 [r, m]; see the contract in the package."""
    rows, columns = gradient.shape
    left = basis.to(torch.float32)
    result = torch.empty(len(basis), rows, dtype=torch.float32, device=gradient.device)
    band = max(1, BAND_ELEMENTS // max(columns, 1))
    for start in range(0, rows, band):
        result[:, start : start + band] = left @ gradient[start : start + band].to(torch.float32).t()
    return result
