"""The straight path from noise to data: where it is at time t, the velocity there, and the loss of a model of it.

x_t = (1 − t) x₀ + t x₁ with x₀ noise and x₁ data, so that t = 0 is noise and t = 1 is data; the velocity is x₁ − x₀.
Source: arXiv 2506.06952, section 3.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from lisa_kernels.errors import InputError

# What checkpoints say of their times; a model of another convention would be sampled backwards.
CONVENTION = "x_t = (1 - t) noise + t data"


class VelocityModel(Protocol):
    """What is trained and sampled: the velocity at x [batch, ...] and times [batch] under a condition."""

    def __call__(self, x: Tensor, times: Tensor, condition: Any) -> Tensor:
        """Return the velocity, of x's shape."""


def interpolate(noise: Tensor, data: Tensor, times: Tensor) -> Tensor:
    """Return x_t; noise, data: [batch, ...] of one shape, times: [batch] in [0, 1]."""
    if noise.shape != data.shape or times.shape != data.shape[:1]:
        raise InputError(
            f"noise {list(noise.shape)}, data {list(data.shape)} and times {list(times.shape)} were given; noise and "
            "data of one shape and one time for each are wanted."
        )
    t = times.reshape(-1, *[1] * (data.dim() - 1)).to(data.dtype)
    return (1 - t) * noise + t * data


def flow_loss(
    model: VelocityModel, data: Tensor, times: Tensor, condition: Any = None, noise: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return the mean squared error of the velocity over all elements, a scalar.

    noise: standard normal unless it is given, as in comparisons on common noise.
    """
    noise = torch.randn_like(data) if noise is None else noise
    velocity = model(interpolate(noise, data, times), times, condition)
    return torch.nn.functional.mse_loss(velocity.float(), (data - noise).float())
