"""What each training step sees: images, labels, noise; all of it a function of (seed, step) and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lisa_kernels.flow.data import Images
from lisa_kernels.ops.random_bits import number_key

# Beyond the streams that times and parameters use.
_ORDER_STREAM, _NOISE_STREAM = 4 << 32, 5 << 32


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number_key(seed, stream, number))


@dataclass(frozen=True)
class Batch:
    """pixels, noise: float32 [batch, channels, height, width]; labels: int64 [batch], `any_class` where left out."""

    pixels: Tensor
    labels: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Batches:
    """Batches of `size` images in passes over all of them, each pass in its own order.

    dropout: the share of labels that is replaced by `any_class`, which guidance needs to have been learnt.
    """

    images: Images
    size: int
    dropout: float
    any_class: int
    seed: int

    def __getitem__(self, number: int) -> Batch:
        """Return micro-batch `number`, on the CPU."""
        places = self._places(number * self.size)
        generator = _generator(self.seed, _NOISE_STREAM, number)
        pixels, labels = self.images.pixels[places], self.images.labels[places]
        noise = torch.randn(pixels.shape, generator=generator)
        dropped = torch.rand(len(labels), generator=generator) < self.dropout
        return Batch(pixels, labels.masked_fill(dropped, self.any_class), noise)

    def _places(self, start: int) -> Tensor:
        found, left = list[Tensor](), self.size
        while left:
            number, offset = divmod(start, len(self.images))
            order = torch.randperm(len(self.images), generator=_generator(self.seed, _ORDER_STREAM, number))
            found.append(order[offset : offset + left])
            start, left = start + len(found[-1]), left - len(found[-1])
        return torch.cat(found)
