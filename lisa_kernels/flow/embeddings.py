"""What all groups of a flow transformer share: images to tokens and back, and the embeddings of t and of a class."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lisa_kernels.errors import InputError


class Patches(nn.Module):
    """Images as tokens: each square of `patch` × `patch` pixels, times a matrix, plus a learnt place."""

    def __init__(self, channels: int, height: int, width: int, patch: int, hidden: int) -> None:
        super().__init__()
        if patch < 1 or height % patch or width % patch:
            raise InputError(
                f"images of {width} × {height} pixels cannot be cut into patches of {patch}; give a patch size that "
                "divides both, or another image size."
            )
        self.shape, self.patch = (channels, height, width), patch
        self.linear = nn.Linear(channels * patch * patch, hidden)
        self.places = nn.Parameter(torch.randn(height * width // patch**2, hidden) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Return [batch, tokens, hidden] of [batch, channels, height, width]; raises InputError for another size."""
        if images.shape[1:] != self.shape:
            raise InputError(f"an image is {list(images.shape[1:])}; this model was made for {list(self.shape)}.")
        tokens = nn.functional.pixel_unshuffle(images, self.patch).flatten(2).transpose(1, 2)
        projected: Tensor = self.linear(tokens)
        return projected + self.places


class Head(nn.Module):
    """Tokens back to an image; zero until it has trained, so that a model begins with no velocity."""

    def __init__(self, channels: int, height: int, width: int, patch: int, hidden: int, embedding_width: int) -> None:
        super().__init__()
        self.patch, self.rows = patch, height // patch
        self.norm = nn.RMSNorm(hidden)
        self.modulation = nn.Linear(embedding_width, 2 * hidden)
        self.linear = nn.Linear(hidden, channels * patch * patch)
        for layer in (self.modulation, self.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Return [batch, channels, height, width] of [batch, tokens, hidden]."""
        scale, shift = self.modulation(nn.functional.silu(embedding))[:, None].chunk(2, dim=-1)
        pixels: Tensor = self.linear(self.norm(tokens) * (1 + scale) + shift)
        grid = pixels.transpose(1, 2).unflatten(2, (self.rows, -1))
        return nn.functional.pixel_shuffle(grid, self.patch)


class TimeEmbedding(nn.Module):
    """t in [0, 1] as sines and cosines of 1,000 t over four decades of wavelengths, then two layers."""

    def __init__(self, width: int, frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.layers = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        """Return [batch, width] of times [batch]."""
        steps = torch.arange(self.frequencies, device=times.device, dtype=torch.float32) / self.frequencies
        angles = 1000 * times.float()[:, None] * torch.exp(-math.log(10_000) * steps)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedded: Tensor = self.layers(waves.to(next(self.layers.parameters()).dtype))
        return embedded


class ClassEmbedding(nn.Module):
    """A vector for each class, and one for "any", which guidance leaves out the class with: its number is `any`.

    Of unit variance at the start, well above the embedding of t: with the 0.02 that is usual for tables, digits are not
    told apart for a thousand steps.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.any = classes
        self.table = nn.Embedding(classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Return [batch, width] of labels, int64 [batch]."""
        vectors: Tensor = self.table(labels)
        return vectors
