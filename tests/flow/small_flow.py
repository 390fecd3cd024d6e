"""A small flow model as others write them, which knows nothing of routes, and a step of its training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lisa_kernels import TimestepExperts, attach
from lisa_kernels.flow import ExpertsAdamW

SIZE, CLASSES = 12, 5


class SmallBlock(nn.Module):
    """Norm, two linears, residual; told the time by addition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.runs = 0

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.runs += 1
        return x + self.down(nn.functional.gelu(self.up(self.norm(x) + time)))


class SmallFlow(nn.Module):
    """Velocities of vectors [batch, 12] at times [batch] or one time, for labels [batch]."""

    def __init__(self, layers: int = 6, width: int = 64) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(SIZE, width), nn.Linear(1, width)
        self.label = nn.Embedding(CLASSES, width)
        self.blocks = nn.ModuleList(SmallBlock(width) for _ in range(layers))
        self.head = nn.Linear(width, SIZE)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        time = self.time(t.reshape(-1, 1).to(x.dtype)) + self.label(label)
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden, time)
        velocity: Tensor = self.head(hidden)
        return velocity


def small_flow(layers: int = 6, width: int = 64, seed: int = 0) -> SmallFlow:
    """Return a model with the weights of a seed."""
    torch.manual_seed(seed)
    return SmallFlow(layers, width)


def examples(step: int, rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return noise, data and labels of one step."""
    generator = torch.Generator().manual_seed(1000 + step)
    noise, data = torch.randn(2, rows, SIZE, generator=generator)
    return noise, data, torch.randint(CLASSES, (rows,), generator=generator)


def add_gradients(model: nn.Module, optimizer: ExpertsAdamW, step: int, rows: int = 4) -> Tensor:
    """Run forward and backward of the flow's loss at times of the active group; returns the loss."""
    noise, data, label = examples(step, rows)
    t = optimizer.times(rows)
    loss = (model(torch.lerp(noise, data, t[:, None]), t, label) - (data - noise)).square().mean()
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: ExpertsAdamW, first: int, last: int) -> None:
    """Take the steps first … last − 1."""
    for step in range(first, last):
        add_gradients(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()


def start(method: TimestepExperts, seed: int = 3, paging: str | None = None) -> tuple[SmallFlow, ExpertsAdamW]:
    """Return a model and its optimizer."""
    model = small_flow()
    optimizer = attach(model, method, lr=3e-3, seed=seed, paging=paging)
    assert isinstance(optimizer, ExpertsAdamW)
    return model, optimizer
