"""The cases of the layer benchmark: one linear layer, the input it gets and the gradient that comes back to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import DTYPES
from lisa_kernels.errors import InputError

LARGEST_SIDE = 1 << 20
BLOCKS = "blocks"


@dataclass(frozen=True)
class Case:
    """A layer of `inputs` × `outputs`, and the ranks that the methods give it; its weight is [outputs, inputs]."""

    device: str
    dtype: str
    inputs: int
    outputs: int
    tokens: int = 1024
    rank: int = 128
    lora_rank: int = 16
    gap: int = 200

    @property
    def shape(self) -> str:
        """Inputs and outputs in one word."""
        return f"{self.inputs}x{self.outputs}"

    def check(self) -> None:
        """Raise InputError for a rank that the layer does not allow."""
        least = min(self.inputs, self.outputs)
        for name, rank in (("rank", self.rank), ("lora-rank", self.lora_rank)):
            if rank > least:
                raise InputError(f"--{name} {rank}: a layer of {self.shape} allows at most {least}.")

    def numbers(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Return normal numbers of this shape, the same in every call."""
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(*shape, generator=generator) * scale).to(self.device, DTYPES[self.dtype])

    def weight(self) -> Tensor:
        """Return a weight as networks have them."""
        return self.numbers(self.outputs, self.inputs, scale=self.inputs**-0.5)


class OneLayer(nn.Module):
    """A model of one block with one linear layer, which methods attach to as they do to larger ones."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        block = nn.Sequential(nn.Linear(inputs, outputs, bias=False, device="meta"))
        block[0].weight = nn.Parameter(weight)
        self.blocks = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        y: Tensor = self.blocks[0](x)
        return y

    @property
    def layer(self) -> Any:
        """The layer as it is now; methods swap it."""
        return self.blocks[0][0]  # type: ignore[index]


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Return the (inputs, outputs) that `768x2048,4096x4096` stands for; InputError for what is no shape."""
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,7})\s*[x×]\s*(\d{1,7})\s*", part)
        sides = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= min(sides) <= max(sides) <= LARGEST_SIDE:
            raise InputError(f"--shapes {text!r}: {part!r} is no layer; write INPUTSxOUTPUTS, as in 4096x11008.")
        shapes.append(sides)
    return shapes
