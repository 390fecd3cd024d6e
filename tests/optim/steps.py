"""Parameters, gradients and steps that the optimizer's tests share."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.optim import AdamW8bit

LR = 1e-2


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> list[nn.Parameter]:
    """Return a matrix with 8-bit state, a small matrix and a vector with 32-bit state."""
    shapes = [(64, 80), (5, 7), (300,)]
    return [nn.Parameter(normal(*shape, seed=i, dtype=dtype).to(device)) for i, shape in enumerate(shapes)]


def set_gradients(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    for index, param in enumerate(params):
        param.grad = (normal(*param.shape, seed=1000 * step + index) * scale).to(param.device, param.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def tensors_of(optimizer: AdamW8bit) -> list[Tensor]:
    """Return every tensor that a step may change: weights and state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [tensor for param in params if param in optimizer.state for tensor in optimizer.state[param].values()]
    return [param.detach() for param in params] + states


def assert_same(one: AdamW8bit, other: AdamW8bit) -> None:
    assert len(tensors_of(one)) == len(tensors_of(other))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors_of(one), tensors_of(other)))
    assert (one.steps, one.skipped_steps) == (other.steps, other.skipped_steps)


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded
