"""Examples side by side in rows, rows side by side in batches, and whether a model keeps packed examples apart."""

from __future__ import annotations

import inspect
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.layers import borders_mask
from lisa_kernels.train.chat import IGNORED, Example

Row = dict[str, Tensor]
# Rows that are filled to the last hold a few examples less than their mean length says: found on worked answers.
UNEVEN = 1 / 32
# How many sizes are tried as the smallest of three.
TRIES = 8


def row_of(examples: list[Example], packing: bool) -> Row:
    row = {
        "input_ids": torch.tensor([token for e in examples for token in e.input_ids]),
        "labels": torch.tensor([label for e in examples for label in e.labels]),
    }
    if packing:
        row["position_ids"] = torch.cat([torch.arange(len(e.input_ids)) for e in examples])
    return row


def full_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put the indices of lengths, each of at most `capacity`, into as few rows as a fast rule finds; return the rows.

    The longest that is left begins a row. It takes as many more as rows of what is left hold on average, those with
    which the row is fullest: with more, short ones would be used up where longer ones fill as well, and what is left
    would fit badly. Each row is in the order of the indices, and so are the rows by their first.
    """
    left = _Left(lengths)
    rows = []
    while left.sizes:
        most = max(1, int(capacity * left.count / left.total - UNEVEN))
        row, room = [left.sizes[-1]], capacity - left.sizes[-1]
        left.take(row[0])
        # One more where there is room for one of mean length.
        while found := left.fullest(room, max(most - len(row), int(room * left.count >= left.total))):
            for size in found:
                left.take(size)
            row += found
            room -= sum(found)
        rows.append(row)
    places: dict[int, list[int]] = {}
    for index in reversed(range(len(lengths))):
        places.setdefault(lengths[index], []).append(index)
    return sorted(sorted(places[size].pop() for size in row) for row in rows)


class _Left:
    """Lengths that are in no row yet: sizes, each once and ascending, how many lengths there are, and their total."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._of_size = Counter(lengths)
        self.sizes = sorted(self._of_size)
        self.count, self.total = len(lengths), sum(lengths)

    def take(self, size: int) -> None:
        """Take one length of that size away."""
        self.count -= 1
        self.total -= size
        self._of_size[size] -= 1
        if not self._of_size[size]:
            self.sizes.pop(bisect_left(self.sizes, size))

    def fullest(self, room: int, most: int) -> list[int]:
        """Return the sizes, at most three and at most `most`, that fill the room best; of many more the largest one."""
        fitting = bisect_right(self.sizes, room)
        if not fitting or most < 1:
            return []
        best = [self.sizes[fitting - 1]]
        if most == 1 or best[0] == room or (most > 3 and room > 3 * best[0]):
            return best
        best = self._pair(room, 0) or best
        third = bisect_right(self.sizes, room // 3) - 1
        for smallest in range(third, max(-1, third - TRIES), -1) if most > 2 else ():
            if sum(best) == room:
                break
            size = self.sizes[smallest]
            pair = self._pair(room - size, smallest + (self._of_size[size] < 3), sum(best) - size)
            best = [*pair, size] if pair else best
        return best

    def _pair(self, room: int, least: int, above: int = 0) -> list[int]:
        """Return the two sizes, the smaller one not before place `least`, of the largest sum in (above, room]."""
        best, low = list[int](), bisect_right(self.sizes, room // 2) - 1
        high = low
        # The two are as alike as can be: the shortest are what fills the last gaps.
        while least <= low and high < len(self.sizes) and above < room:
            short, long = self.sizes[low], self.sizes[high]
            if short + long > room:
                low -= 1
                continue
            if short + long > above and (low < high or self._of_size[short] > 1):
                best, above = [long, short], short + long
            high += 1
        return best


def packed_rows(rows: Sequence[Row], seq_len: int) -> list[Row]:
    """Return rows of at most `seq_len` tokens, each of one or more of the given ones, which are one example each."""
    examples = [Example(row["input_ids"].tolist(), row["labels"].tolist()) for row in rows]
    groups = full_rows([len(example.input_ids) for example in examples], seq_len)
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


def collate_flat(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return one batch of a single row, all rows end to end and nothing else, for a model that attends by segments.

    input_ids, labels and position_ids: int64 [1, tokens], the positions from 0 in each example; attention_mask: the
    examples' borders, see `borders_mask`. No token predicts the first one of another example.
    """
    ids, labels = (torch.cat([row[name] for row in rows]) for name in ("input_ids", "labels"))
    positions = torch.cat([row.get("position_ids", torch.arange(len(row["input_ids"]))) for row in rows])
    begins = positions == 0
    borders = torch.cat([begins.nonzero().flatten(), torch.tensor([len(ids)])])
    return {
        "input_ids": ids[None], "labels": labels.masked_fill(begins, IGNORED)[None], "position_ids": positions[None],
        "attention_mask": borders_mask(borders),
    }  # fmt: skip


def longest_example(rows: Sequence[Row]) -> int:
    """Return the tokens of the longest example in any of the rows; 0 without rows."""
    return max((int(row["position_ids"].max()) + 1 if "position_ids" in row else len(row["input_ids"]) for row in rows),
               default=0)  # fmt: skip


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
