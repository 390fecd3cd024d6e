"""Weights, gradients and groups that the tests of `GaLoreAdamW8bit` share."""

from __future__ import annotations

from typing import Any

import torch
from optim.steps import normal
from torch import Tensor, nn

RANK = 4


def group(*params: nn.Parameter, rank: int = RANK, **settings: Any) -> dict[str, Any]:
    return {"params": list(params), "rank": rank, **settings}


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(normal(*shape, seed=seed, dtype=dtype))


def gradient(shape: tuple[int, int], step: int = 0) -> Tensor:
    """Return a gradient of eight strong directions; at step 0 of different strengths, which leave an SVD no choice."""
    m, n = shape
    left, right = torch.linalg.qr(normal(m, 8, seed=90))[0], torch.linalg.qr(normal(n, 8, seed=91))[0]
    strengths = torch.diag(2.0 ** -torch.arange(8)) if step == 0 else normal(8, 8, seed=step)
    return 8 * left @ strengths @ right.t() + 0.01 * normal(m, n, seed=1000 + step)


def mixed(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[dict[str, Any]]]:
    """Return parameters and groups of every kind: 8-bit and 32-bit moments, three types, a plain matrix, a vector."""
    shapes = [(96, 64), (40, 24), (24, 40), (64, 80), (300,)]
    params = [matrix(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    groups = [
        group(params[0], rank=48, proj_type="std", update_proj_gap=3),
        group(params[1], rank=8, proj_type="full", update_proj_gap=4, scale=0.5),
        {"params": params[3:], "weight_decay": 0.0},
        group(params[2], rank=8, proj_type="reverse_std", update_proj_gap=2),
    ]
    return params, groups


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for index, param in enumerate(params):
            shape = tuple(param.shape)
            grad = normal(*shape, seed=1000 * step + index)
            param.grad = grad.to(param.dtype)
        optimizer.step()
