"""A flow whose layers are copies of a pretrained decoder's and see what that decoder keeps of a text.

The form called "Couple" in arXiv 2506.06952: the decoder is frozen and reads a text once; image tokens attend to its
keys and values of the same layer. The decoder is no part of the model: it is neither trained nor saved with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.flow.context import Context, read_context
from lisa_kernels.flow.intervals import Intervals
from lisa_kernels.flow.replica import replicate, rotation
from lisa_kernels.flow.transformer import FlowShape, GroupedFlow, Seen

# What is read where the text is left out, for guidance.
NO_TEXT = "a picture"


class Reader:
    """A frozen decoder with its tokenizer; `path` is what it was loaded from."""

    def __init__(self, decoder: Any, tokenizer: Any, path: str = "") -> None:
        self.decoder, self.tokenizer, self.path = decoder.eval().requires_grad_(False), tokenizer, path

    def read(self, texts: Sequence[str]) -> Context:
        """Return what the decoder keeps of each text. Raises InputError for a text without tokens."""
        ids = [self.tokenizer(text)["input_ids"] for text in texts]
        for text, row in zip(texts, ids):
            if not row:
                raise InputError(f"the text {text!r} has no tokens; give one with words.")
        return read_context(self.decoder, ids)


def shape_of(reader: Reader, shape: FlowShape) -> FlowShape:
    """Return the shape with the sizes that follow from the decoder."""
    config = reader.decoder.config.get_text_config()
    return replace(
        shape, hidden=config.hidden_size, layers=config.num_hidden_layers, heads=config.num_attention_heads
    )  # fmt: skip


class TextFlow(GroupedFlow):
    """A flow that is told by texts what to draw; label k stands for text k, the last for none in particular.

    Its layers begin as copies of the decoder's, in float32, with modulation by t that begins as none.
    """

    def __init__(self, shape: FlowShape, intervals: Intervals, reader: Reader, texts: Sequence[str]) -> None:
        shape = shape_of(reader, shape)
        # A list, so that the decoder is no part of the model.
        self._outside: list[Any]
        copies = list[Any]()

        def blocks(route: Any) -> Any:
            copies.extend(replicate(reader.decoder, shape.reuse, route.size))
            return copies[0]

        super().__init__(shape, intervals, blocks)
        self._outside = [reader]
        self.rotary = copies[1]
        self.tell(texts)

    @property
    def reader(self) -> Reader:
        """The decoder that reads texts."""
        reader: Reader = self._outside[0]
        return reader

    def tell(self, texts: Sequence[str]) -> None:
        """Have the labels stand for these texts; they are read now, once."""
        self.texts = tuple(texts)
        self.any_class = len(texts)
        self._context = self.reader.read([*texts, NO_TEXT])

    def condition(self, labels: Tensor) -> Context:
        """Return what is kept of the labels' texts, where the model is; the decoder may stay elsewhere."""
        if self._context.mask.device != self.patches.places.device:
            self._context = self._context.to(self.patches.places.device)
        return self._context[labels]

    def like(self) -> TextFlow:
        """Return a model of the same form with weights of its own, beside the same decoder."""
        return TextFlow(self.shape, self.route.intervals, self.reader, self.texts)

    def settings(self) -> dict[str, Any]:
        """Return plain values from which the same model can be made, its weights and the decoder aside."""
        return {**super().settings(), "texts": list(self.texts)}

    def _conditioned(self, times: Tensor, condition: Context) -> tuple[Tensor, Callable[[int], Seen]]:
        tokens = torch.arange(self.patches.places.shape[0], device=times.device)
        turn = rotation(self.rotary, condition.lengths[:, None] + tokens)
        return self.times(times), lambda number: (condition.layer(number), turn)
