"""The largest magnitude and the sum of squares in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements worked on at a time, so that temporaries stay small.
CHUNK = 1 << 20


def grad_norm(grads: list[Tensor], squares: bool) -> Tensor:
    """Return float64 [2]: the largest magnitude (NaN if there is one) and the sum of squares, 0 unless asked for."""
    largest = torch.zeros((), dtype=torch.float32, device=grads[0].device)
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device)
    for grad in grads:
        for chunk in grad.view(-1).split(CHUNK):
            if chunk.numel():
                largest = torch.maximum(largest, chunk.abs().amax().to(torch.float32))
            if squares:
                total = total + chunk.to(torch.float64).square().sum()
    return torch.stack([largest.to(torch.float64), total])
