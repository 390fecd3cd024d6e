"""Gradient norms of the layers of a period, added up on the device: for samplers that adapt to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lisa_kernels.distributed import total_norm


def add_norm(seen: Tensor | None, grads: Sequence[Tensor], unscaling: Tensor) -> Tensor:
    """Return (sum, count) float32 [2] of a layer's norms with that of these gradients; only a finite one counts."""
    norm = total_norm(grads).to(torch.float32) * unscaling
    now = torch.stack([norm, torch.ones_like(norm)]) * torch.isfinite(norm)
    now = torch.nan_to_num(now, nan=0.0, posinf=0.0)
    return now if seen is None else seen + now


def mean_norms(norms: Mapping[int, Tensor]) -> dict[int, float]:
    """Return each layer's mean norm, where one counted; the host waits for all of them once."""
    if not norms:
        return {}
    device = next(iter(norms.values())).device
    sums = torch.stack([seen.to(device) for seen in norms.values()]).tolist()
    return {index: total / count for index, (total, count) in zip(norms, sums) if count}
