"""Attention among the tokens of each segment in plain PyTorch: the definition, differentiable."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def segment_attention(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scale: float) -> Tensor:
    """Return the result [T, H, d]; see the contract in the package."""
    shared, results = query.shape[1] // key.shape[1], []
    ends = borders.tolist()
    for start, end in pairwise(ends):
        q = query[start:end].transpose(0, 1)
        k, v = (part[start:end].repeat_interleave(shared, 1).transpose(0, 1) for part in (key, value))
        later = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).triu(1)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(later, -torch.inf)
        results.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(results)
