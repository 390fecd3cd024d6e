"""One layer of a flow transformer: attention of image tokens, then a feed-forward network, both modulated by t.

    RMS norm → attention to context and image → scale(t) → +
    RMS norm → scale, shift(t) → feed-forward → RMS norm → scale(t) → +

Source: arXiv 2506.06952, figure 3. Scales are 1 + a linear map of the embedding that starts at zero, which the paper
leaves open: a layer taken over from a pretrained decoder begins as what it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lisa_kernels.flow.residual_attention import ContextKeys, HeadGates, attend, check_reuse

Rotate = Callable[[Tensor], Tensor]


class ImageAttention(nn.Module):
    """Projections to query, key and value, one attention, and the projection back.

    query_norm, key_norm: of each head's vectors, where the decoder it comes from has them.
    """

    def __init__(
        self, query: nn.Linear, key: nn.Linear, value: nn.Linear, output: nn.Linear, head_width: int,
        query_norm: nn.Module | None = None, key_norm: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.query, self.key, self.value, self.output = query, key, value, output
        self.head_width = head_width
        self.query_norm = query_norm or nn.Identity()
        self.key_norm = key_norm or nn.Identity()

    @classmethod
    def fresh(cls, width: int, heads: int) -> ImageAttention:
        """Return one with random weights."""
        query, key, value, output = (nn.Linear(width, width, bias=False) for _ in range(4))
        return cls(query, key, value, output, width // heads)

    @property
    def heads(self) -> int:
        """Heads of the query."""
        return self.query.out_features // self.head_width

    def forward(
        self, x: Tensor, context: ContextKeys | None, previous: Tensor | None, gates: Tensor | None, reuse: str,
        rotate: Rotate | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return (output [batch, tokens, width], map for the next layer); see `attend`."""
        query, key, value = (self._heads(part(x)) for part in (self.query, self.key, self.value))
        query, key = self.query_norm(query), self.key_norm(key)
        if rotate is not None:
            query, key = rotate(query), rotate(key)
        out, image_map = attend(
            query, key, value, context=context, previous=previous, gates=gates, reuse=reuse
        )  # fmt: skip
        projected: Tensor = self.output(out.transpose(1, 2).flatten(2))
        return projected, image_map

    def _heads(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        return split


class FlowBlock(nn.Module):
    """A layer of the form above.

    embedding_width: of the embedding of t. reuse: see `residual_attention`; a block that starts a group has no gates.
    """

    def __init__(
        self, attention: ImageAttention, attention_norm: nn.Module, network: nn.Module, network_norm: nn.Module,
        width: int, embedding_width: int, reuse: str = "none", first: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention, self.attention_norm = attention, attention_norm
        self.network, self.network_norm = network, network_norm
        self.output_norm = nn.RMSNorm(width)
        self.modulation = nn.Linear(embedding_width, 4 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.reuse = check_reuse(reuse)
        self.gates = HeadGates(embedding_width, attention.heads) if reuse != "none" and not first else None

    @classmethod
    def fresh(cls, width: int, heads: int, expansion: int = 4, reuse: str = "none", first: bool = False) -> FlowBlock:
        """Return a layer with random weights."""
        network = nn.Sequential(
            nn.Linear(width, expansion * width), nn.GELU(approximate="tanh"), nn.Linear(expansion * width, width)
        )
        norms = nn.RMSNorm(width), nn.RMSNorm(width)
        return cls(ImageAttention.fresh(width, heads), norms[0], network, norms[1], width, width, reuse, first)

    def forward(
        self, x: Tensor, embedding: Tensor, previous: Tensor | None = None, context: ContextKeys | None = None,
        rotate: Rotate | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return (x [batch, tokens, width], map for the next layer).

        embedding: [batch, embedding width], of t and of what it is joined with. previous: the map that the layer before
        returned. rotate: turns queries and keys by their positions.
        """
        changes: tuple[Tensor, ...] = self.modulation(torch.nn.functional.silu(embedding))[:, None].chunk(4, dim=-1)
        after_attention, scale, shift, after_network = changes
        gates = None if self.gates is None or previous is None else self.gates(embedding)
        attended, image_map = self.attention(self.attention_norm(x), context, previous, gates, self.reuse, rotate)
        x = x + attended * (1 + after_attention)
        hidden = self.network(self.network_norm(x) * (1 + scale) + shift)
        return x + self.output_norm(hidden) * (1 + after_network), image_map
