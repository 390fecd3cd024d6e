"""Attention of image tokens to context and image, that may reuse the map of the layer before.

Timestep-conditioned residual attention (arXiv 2506.06952): A^l ← A^l + gate(t) ⊗ A^(l−1) on the image × image block,
one gate per head. The paper leaves open whether A is taken before or after the softmax, what the gate is, and what the
first layer of a group reuses. Here A is the scores before the softmax (`reuse="after"` takes the weights), the gate is
a linear map of the embedding of t that starts at zero, and a group's first layer reuses nothing. A^(l−1) is what the
layer before used, its own reuse within.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lisa_kernels.errors import unknown_name

# Which map is reused: none, the scores before the softmax, or the weights after it.
REUSES = ("none", "before", "after")


def check_reuse(reuse: str) -> str:
    """Return the name; raises InputError for one that is not known."""
    if reuse not in REUSES:
        raise unknown_name("kind of residual attention", reuse, REUSES)
    return reuse


class HeadGates(nn.Module):
    """One gate per head, linear in the embedding of t; zero until it has trained."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, heads)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, embedding: Tensor) -> Tensor:
        """Return the gates [batch, heads, 1, 1] of an embedding [batch, width]."""
        gates: Tensor = self.linear(embedding)
        return gates[:, :, None, None]


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, context: ContextKeys | None = None, previous: Tensor | None = None,
    gates: Tensor | None = None, reuse: str = "none",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return (output [batch, heads, tokens, head width], the image × image map that the next layer may reuse).

    query: [batch, heads, tokens, head width] of the image; key, value: the same with as many heads or a divisor of
    them. Every image token sees all of the context and all image tokens. previous: [batch, heads, tokens, tokens], the
    map of the layer before; gates: [batch, heads, 1, 1]. Scores and softmax are in float32. The map is None where
    nothing is reused.
    """
    heads, tokens = query.shape[1], query.shape[2]
    scores = (query @ _per_head(key, heads).transpose(-1, -2)).float() / math.sqrt(query.shape[-1])
    value = _per_head(value, heads)
    if reuse == "before" and previous is not None and gates is not None:
        scores = scores + gates.float() * previous
    image = scores
    if context is not None:
        scores = torch.cat([context.scores(query), scores], dim=-1)
        value = torch.cat([_per_head(context.value, heads).to(value.dtype), value], dim=2)
    weights = scores.softmax(dim=-1)
    if reuse == "after":
        image = weights[..., -tokens:]
        if previous is not None and gates is not None:
            image = image + gates.float() * previous
            weights = torch.cat([weights[..., :-tokens], image], dim=-1)
    return weights.to(value.dtype) @ value, None if reuse == "none" else image


class ContextKeys:
    """Keys and values of one layer for the context, [batch, heads, tokens, head width], and which tokens are there.

    mask: bool [batch, tokens], False for padding, which nothing sees; None: all are there.
    """

    def __init__(self, key: Tensor, value: Tensor, mask: Tensor | None = None) -> None:
        self.key, self.value, self.mask = key, value, mask

    def scores(self, query: Tensor) -> Tensor:
        """Return float32 [batch, heads, image tokens, context tokens], −∞ for padding."""
        key = _per_head(self.key, query.shape[1]).to(query.dtype)
        scores = (query @ key.transpose(-1, -2)).float() / math.sqrt(query.shape[-1])
        return scores if self.mask is None else scores.masked_fill(~self.mask[:, None, None, :], -math.inf)


def _per_head(tensor: Tensor, heads: int) -> Tensor:
    """Return keys or values with one head for each of the query's, shared ones repeated."""
    shared = heads // tensor.shape[1]
    return tensor if shared == 1 else tensor.repeat_interleave(shared, dim=1)
