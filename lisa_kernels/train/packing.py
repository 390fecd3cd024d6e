"""Examples side by side in rows, rows side by side in batches, and whether a model keeps packed examples apart."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.train.chat import IGNORED, Example

Row = dict[str, Tensor]


def row_of(examples: list[Example], packing: bool) -> Row:
    row = {
        "input_ids": torch.tensor([token for e in examples for token in e.input_ids]),
        "labels": torch.tensor([label for e in examples for label in e.labels]),
    }
    if packing:
        row["position_ids"] = torch.cat([torch.arange(len(e.input_ids)) for e in examples])
    return row


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each index into the first bin that has room for its length; return the bins."""
    # A binary tree over the bins holds the largest room below each node: O(log n) per item instead of O(n).
    size = 1 << max(0, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * size)
    bins: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        node = 1
        while node < size:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        bins.setdefault(node, []).append(index)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return list(bins.values())


def packed_rows(rows: Sequence[Row], seq_len: int) -> list[Row]:
    """Return rows of at most `seq_len` tokens, each of one or more of the given ones, which are one example each."""
    examples = [Example(row["input_ids"].tolist(), row["labels"].tolist()) for row in rows]
    groups = first_fit([len(example.input_ids) for example in examples], seq_len)
    return [row_of([examples[index] for index in group], packing=True) for group in groups]


def collate(rows: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Return one batch, int64 [rows, longest]: input_ids, labels, and what tells the model where examples end.

    Shorter rows are padded on the right with label -100. Packed rows come with position_ids and no attention mask,
    their padding as one more sequence from position 0; other rows with attention_mask when one of them is padded.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    longest = max(lengths)

    def stack(name: str, fill: int) -> Tensor:
        padding = [torch.full((longest - length,), fill) for length in lengths]
        return torch.stack([torch.cat([row[name], pad]) for row, pad in zip(rows, padding)])

    batch = {"input_ids": stack("input_ids", pad_token_id), "labels": stack("labels", IGNORED)}
    if "position_ids" in rows[0]:
        batch["position_ids"] = torch.stack(
            [torch.cat([row["position_ids"], torch.arange(longest - n)]) for row, n in zip(rows, lengths)]
        )
    elif min(lengths) < longest:
        batch["attention_mask"] = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return batch


def pad_token_id(tokenizer: Any) -> int:
    """Return an id to pad with: the tokenizer's own, else its end token, else 0; padding is never supervised."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def accepts_position_ids(model: Any) -> bool:
    """Return whether the model's forward takes position_ids."""
    return "position_ids" in inspect.signature(model.forward).parameters


def isolates_packed_examples(model: Any) -> bool:
    """Return whether an example in a packed row is blind to the examples before it, by one forward of 2 x 12 tokens.

    Some models take position_ids yet do not build their attention mask from them (OPT and Falcon in transformers 5);
    and every model ignores packing with a key-value cache, so train with use_cache=False.
    """
    if not accepts_position_ids(model):
        return False
    embedding = model.get_input_embeddings().weight
    tokens = (torch.arange(24).reshape(2, 12) * 7 + 3) % embedding.shape[0]
    tokens[:, 6:] = tokens[0, 6:]
    positions = torch.arange(12).remainder(6).expand(2, 12)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            inputs = {"input_ids": tokens.to(embedding.device), "position_ids": positions.to(embedding.device)}
            logits = model(**inputs, use_cache=False).logits[:, 6:].float()
    finally:
        model.train(training)
    # rounding may differ between two rows of a batch, a visible neighbour changes the logits far more
    return bool((logits[0] - logits[1]).norm() <= 0.01 * logits[0].norm())
