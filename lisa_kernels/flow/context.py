"""What image tokens see of texts: keys and values of every layer of a frozen decoder, which reads each text once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.flow.residual_attention import ContextKeys


class Context:
    """Texts as a decoder's layers keep them, one a row.

    keys, values: of each layer [rows, heads, tokens, head width]; mask: bool [rows, tokens], False for padding, which
    is on the right.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor) -> None:
        self._keys, self._values, self.mask = list(keys), list(values), mask

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: Tensor) -> Context:
        """Return the texts at these places, int64 [rows]."""
        rows = rows.to(self.mask.device)
        return Context([key[rows] for key in self._keys], [value[rows] for value in self._values], self.mask[rows])

    def joined(self, other: Context) -> Context:
        """Return these texts, then those of another context that was read together with them."""
        keys, values = (
            [torch.cat(pair) for pair in zip(ours, theirs)]
            for ours, theirs in ((self._keys, other._keys), (self._values, other._values))
        )
        return Context(keys, values, torch.cat([self.mask, other.mask]))

    def to(self, device: torch.device) -> Context:
        """Return the same on a device."""
        keys, values = ([part.to(device) for part in parts] for parts in (self._keys, self._values))
        return Context(keys, values, self.mask.to(device))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, int64 [rows]."""
        return self.mask.sum(dim=1)

    def layer(self, number: int) -> ContextKeys:
        """Return what a layer's image tokens attend to."""
        return ContextKeys(self._keys[number], self._values[number], self.mask)


@torch.no_grad()
def read_context(decoder: Any, ids: Sequence[Sequence[int]]) -> Context:
    """Return what the decoder keeps of token ids, a row a text, in one pass; nothing of the decoder changes.

    Raises InputError for a text without tokens, and for a decoder that keeps no keys and values by layer.
    """
    if not all(ids):
        raise InputError("a text has no tokens; give one with words.")
    device, longest = next(decoder.parameters()).device, max(map(len, ids))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=device)
    mask = torch.arange(longest, device=device) < torch.tensor([len(row) for row in ids], device=device)[:, None]
    was_training = decoder.training
    decoder.eval()
    try:
        kept = decoder(input_ids=padded, attention_mask=mask.long(), use_cache=True).past_key_values
    finally:
        decoder.train(was_training)
    layers = getattr(kept, "layers", None) or []
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        raise InputError(
            f"{type(decoder).__name__} keeps no keys and values for each of its layers, which image tokens attend to; "
            "use a decoder such as a Llama, Qwen or SmolLM."
        )
    return Context([layer.keys for layer in layers], [layer.values for layer in layers], mask)
