"""Turn records into rows of token ids with labels, and rows into batches."""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.text import Text
from torch import Tensor
from torch.utils.data import Dataset

from lisa_kernels.errors import InputError
from lisa_kernels.train.chat import IGNORED, Example, encode_conversations
from lisa_kernels.train.records import Records

ENCODE_BATCH = 256
Row = dict[str, Tensor]


@dataclass
class TokenizedData(Dataset[Row]):
    """Rows for training: a map-style data set, and the counts that describe it.

    rows: input_ids and labels, int64 [length], length at most the sequence length; position_ids in packed rows.
    tokens counts the rows' tokens, supervised_tokens those that some position predicts. examples counts documents,
    prompts or conversations in the rows; truncated those cut to fit; dropped those left with nothing to predict.
    """

    rows: list[Row] = field(default_factory=list)
    tokens: int = 0
    supervised_tokens: int = 0
    examples: int = 0
    truncated: int = 0
    dropped: int = 0
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def max_token_id(self) -> int:
        """Return the largest token id in any row, -1 without rows."""
        return max((int(row["input_ids"].max()) for row in self.rows), default=-1)


def split_records(records: Records, eval_fraction: float, seed: int) -> tuple[Records, Records]:
    """Split into (training, held out): whole items drawn by `seed`, or the end of the text when there are too few.

    eval_fraction: 0 (nothing held out) to 0.5. Both parts keep the order of the source.
    """
    if not 0 <= eval_fraction <= 0.5:
        raise InputError(f"eval fraction {eval_fraction} is outside 0 to 0.5: give the share of the data to hold out.")
    count = len(records)
    if eval_fraction == 0:
        return records, dataclasses.replace(records, items=[])
    if records.kind == "text" and count * eval_fraction < 1:
        trained, held = _split_text(records, eval_fraction)
    elif count < 2:
        raise InputError(f"data {records.source!r} holds one example: give more, or eval fraction 0 to hold none out.")
    else:
        order = list(range(count))
        random.Random(seed).shuffle(order)
        chosen = set(order[: max(1, round(count * eval_fraction))])
        trained = [item for index, item in enumerate(records.items) if index not in chosen]
        held = [records.items[index] for index in sorted(chosen)]
    return dataclasses.replace(records, items=trained), dataclasses.replace(records, items=held)


def _split_text(records: Records, eval_fraction: float) -> tuple[list[str], list[str]]:
    """Cut the sequence of texts so that the last `eval_fraction` of its characters is held out."""
    total = sum(map(len, records.items))
    cut = total - max(1, round(total * eval_fraction))
    trained, held, start = [], [], 0
    for text in records.items:
        inside = min(max(cut - start, 0), len(text))
        trained.append(text[:inside])
        held.append(text[inside:])
        start += len(text)
    trained, held = ([text for text in part if text.strip()] for part in (trained, held))
    if not trained or not held:
        raise InputError(
            f"data {records.source!r} has only {total} characters, too few to hold {eval_fraction:g} of them out:"
            " give more text, or eval fraction 0."
        )
    return trained, held


def tokenize_records(records: Records, tokenizer: Any, seq_len: int, packing: bool = True) -> TokenizedData:
    """Return the rows of at most `seq_len` tokens that the records make.

    Texts are joined by the end token and cut into full rows, every token supervised; a remainder is dropped unless it
    is all there is. Of prompts only the completion is supervised, of conversations only what the assistant says, both
    with the token that ends them; such examples are cut on the right to `seq_len` and, with packing, put whole into
    shared rows whose position_ids begin at 0 with each example. Raises InputError when nothing is supervised.
    """
    if seq_len < 2:
        raise InputError(f"sequence length {seq_len} is too short: a row needs 2 tokens or more to predict one.")
    if not len(records):
        return TokenizedData()
    records = records.for_template(getattr(tokenizer, "chat_template", None))
    if records.kind == "text":
        return _tokenize_texts(records, tokenizer, seq_len)
    notes: list[str] = []
    encode = _encode_prompts if records.kind == "prompt" else encode_conversations
    return _supervised_rows(list(encode(records, tokenizer, notes)), seq_len, packing, notes)


def _encode(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    """Yield the ids of each text without special tokens around it."""
    for start in range(0, len(texts), ENCODE_BATCH):
        batch = list(texts[start : start + ENCODE_BATCH])
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def _beginning(tokenizer: Any) -> list[int]:
    """Return the begin token as a list, empty when the tokenizer does not put one before a text."""
    first = tokenizer("a")["input_ids"][:1]
    return list(first) if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def _ending(tokenizer: Any, notes: list[str]) -> list[int]:
    if tokenizer.eos_token_id is None:
        notes.append("the tokenizer has no end token: nothing marks where a text ends")
        return []
    return [tokenizer.eos_token_id]


def _tokenize_texts(records: Records, tokenizer: Any, seq_len: int) -> TokenizedData:
    notes: list[str] = []
    begin, end = _beginning(tokenizer), _ending(tokenizer, notes)
    pieces: list[Tensor] = []
    for ids in _encode(tokenizer, records.items):
        pieces.append(torch.tensor((end if pieces else []) + begin + ids, dtype=torch.long))
    stream = torch.cat(pieces)
    full = stream[: stream.numel() // seq_len * seq_len].split(seq_len) if stream.numel() >= seq_len else (stream,)
    rows = [{"input_ids": ids, "labels": ids} for ids in full]
    supervised = _count_supervised(rows)
    if not supervised:
        raise InputError(f"no supervised token: the text is only {stream.numel()} tokens long; give more text.")
    return TokenizedData(rows, sum(map(len, full)), supervised, len(records), notes=notes)


def _count_supervised(rows: Iterable[Row]) -> int:
    # position t predicts label t + 1, so the first label of a row is never used
    return sum(int((row["labels"][1:] != IGNORED).sum()) for row in rows)


def _encode_prompts(records: Records, tokenizer: Any, notes: list[str]) -> Iterator[Example]:
    begin, end = _beginning(tokenizer), _ending(tokenizer, notes)
    prompts = _encode(tokenizer, [item["prompt"] for item in records.items])
    completions = _encode(tokenizer, [item["completion"] for item in records.items])
    for prompt, completion in zip(prompts, completions):
        answer = completion if end and completion[-1:] == end else completion + end
        yield Example(begin + prompt + answer, [IGNORED] * len(begin + prompt) + answer)


def _supervised_rows(examples: list[Example], seq_len: int, packing: bool, notes: list[str]) -> TokenizedData:
    kept, truncated = list[Example](), 0
    for example in examples:
        # the first token has no predecessor, and in a packed row the one before it is another example's
        cut = Example(example.input_ids[:seq_len], [IGNORED, *example.labels[1:seq_len]])
        if any(label != IGNORED for label in cut.labels):
            kept.append(cut)
            truncated += len(example.input_ids) > seq_len
    if not kept:
        raise InputError(_nothing_supervised(examples, seq_len))
    lengths = [len(example.input_ids) for example in kept]
    groups = _first_fit(lengths, seq_len) if packing else [[index] for index in range(len(kept))]
    rows = [_row([kept[index] for index in group], packing) for group in groups]
    dropped = len(examples) - len(kept)
    if dropped:
        notes.append(
            f"{dropped} of {len(examples)} examples are dropped: nothing to learn in their first {seq_len} tokens"
        )
    return TokenizedData(rows, sum(lengths), _count_supervised(rows), len(kept), truncated, dropped, notes)


def _nothing_supervised(examples: list[Example], seq_len: int) -> str:
    starts = [next((at for at, label in enumerate(e.labels) if at and label != IGNORED), None) for e in examples]
    known = [start for start in starts if start is not None]
    if not known:
        return "no supervised token: the examples hold no answer to learn; check the data and the chat template."
    return (
        f"no supervised token is left: each of the {len(examples)} prompts is as long as --seq-len {seq_len}"
        f" or longer (the shortest has {min(known)} tokens); give a longer --seq-len or shorter prompts."
    )


def _row(examples: list[Example], packing: bool) -> Row:
    row = {
        "input_ids": torch.tensor([token for e in examples for token in e.input_ids]),
        "labels": torch.tensor([label for e in examples for label in e.labels]),
    }
    if packing:
        row["position_ids"] = torch.cat([torch.arange(len(e.input_ids)) for e in examples])
    return row


def _first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
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


def preview(row: Row, tokenizer: Any, max_tokens: int = 400) -> Text:
    """Return the first example of a row as text: what is supervised highlighted and between ⟦ ⟧, the rest dim."""
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    starts = (row["position_ids"][1:] == 0).nonzero().flatten().tolist() if "position_ids" in row else []
    length = starts[0] + 1 if starts else len(ids)
    text, start = Text(), 0
    shown = min(length, max_tokens)
    while start < shown:
        supervised = labels[start] != IGNORED
        end = start
        while end < shown and (labels[end] != IGNORED) == supervised:
            end += 1
        piece = tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text.append(f"⟦{piece}⟧" if supervised else piece, style="bold green" if supervised else "dim")
        start = end
    if shown < length:
        text.append(f" … ({length - shown} more tokens)", style="dim")
    return text
