"""Turn records into rows of token ids with labels, and rows into batches."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.text import Text
from torch import Tensor
from torch.utils.data import Dataset

from lisa_kernels.errors import InputError
from lisa_kernels.train.answer_spans import agreement
from lisa_kernels.train.chat import IGNORED, Example, beginning, encode_conversations, labels_in
from lisa_kernels.train.packing import (
    Row,
    accepts_position_ids,
    collate,
    full_rows,
    isolates_packed_examples,
    longest_example,
    packed_rows,
    pad_token_id,
    row_of,
)
from lisa_kernels.train.records import Records

ENCODE_BATCH = 256

__all__ = [
    "IGNORED", "TokenizedData", "accepts_position_ids", "collate", "isolates_packed_examples", "longest_example",
    "packed", "pad_token_id", "preview", "split_records", "tokenize_records", "tokenize_split",
]  # fmt: skip


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

    def empty_share(self, seq_len: int) -> float:
        """Return which share of rows of `seq_len` tokens holds none; 0 without rows."""
        return 1 - self.tokens / (len(self.rows) * seq_len) if self.rows else 0.0

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
    is all there is. A prompt and its completion are encoded as one text, in which each token that holds a character of
    the completion is supervised; of conversations only what the assistant says is, both with the token that ends them.
    Such examples are cut on the right to `seq_len` and, with packing, put whole into shared rows whose position_ids
    begin at 0 with each example. Raises InputError when nothing is supervised.
    """
    _check_seq_len(seq_len)
    if not len(records):
        return TokenizedData()
    records = records.for_template(getattr(tokenizer, "chat_template", None))
    if records.kind == "text":
        return _tokenize_texts(records, tokenizer, seq_len)
    notes = list(records.notes)
    examples = _encode_examples(records, tokenizer, notes)
    fitting, counts = _cut_examples(examples, seq_len)
    if not fitting:
        raise InputError(_nothing_supervised(examples, seq_len))
    return _rows(fitting, seq_len, packing, counts, [*notes, *counts.notes(seq_len)])


def tokenize_split(
    records: Records, tokenizer: Any, seq_len: int, packing: bool, eval_fraction: float, seed: int
) -> tuple[TokenizedData, TokenizedData]:
    """Return the rows of (the training part, the part held out); examples with nothing to learn are in neither.

    eval_fraction: as for `split_records`. Raises InputError as `tokenize_records` does.
    """
    _check_seq_len(seq_len)
    records = records.for_template(getattr(tokenizer, "chat_template", None))
    if records.kind == "text" or not eval_fraction:
        trained, held = split_records(records, eval_fraction, seed)
        train = tokenize_records(trained, tokenizer, seq_len, packing)
        try:
            return train, tokenize_records(held, tokenizer, seq_len, packing)
        except InputError:
            train.notes.append("nothing is held out: the part for it is too short to predict a token of it")
            return train, TokenizedData()
    notes = list(records.notes)
    examples = _encode_examples(records, tokenizer, notes)
    fitting, counts = _cut_examples(examples, seq_len)
    if not fitting:
        raise InputError(_nothing_supervised(examples, seq_len))
    notes += counts.notes(seq_len)
    if len(fitting) == 1 < len(examples):
        notes.append("nothing is held out: only one row has anything to learn")
        return _rows(fitting, seq_len, packing, counts, notes), TokenizedData()
    drawn = split_records(dataclasses.replace(records, items=fitting), eval_fraction, seed)
    train = _rows(drawn[0].items, seq_len, packing, counts, notes)
    return train, _rows(drawn[1].items, seq_len, packing, _Cut(), [])


def _check_seq_len(seq_len: int) -> None:
    if seq_len < 2:
        raise InputError(f"sequence length {seq_len} is too short: a row needs 2 tokens or more to predict one.")


def _encode(tokenizer: Any, texts: Sequence[str], **options: Any) -> Iterator[Any]:
    """Yield the encoding of each text without special tokens around it."""
    for start in range(0, len(texts), ENCODE_BATCH):
        batch = list(texts[start : start + ENCODE_BATCH])
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False, **options)
        yield from ({name: encoded[name][n] for name in encoded} for n in range(len(batch)))


def _ending(tokenizer: Any, notes: list[str]) -> list[int]:
    if tokenizer.eos_token_id is None:
        notes.append("the tokenizer has no end token: nothing marks where a text ends")
        return []
    return [tokenizer.eos_token_id]


def _begun(ids: list[int], begin: list[int]) -> list[int]:
    """Return ids that begin with the begin token, which a text may hold itself."""
    return ids if ids[: len(begin)] == begin else begin + ids


def _tokenize_texts(records: Records, tokenizer: Any, seq_len: int) -> TokenizedData:
    notes = list(records.notes)
    begin, end = beginning(tokenizer), _ending(tokenizer, notes)
    pieces: list[Tensor] = []
    ended = True
    for encoding in _encode(tokenizer, records.items):
        ids = _begun(list(encoding["input_ids"]), begin)
        pieces.append(torch.tensor(([] if ended else end) + ids, dtype=torch.long))
        ended = bool(end) and ids[-1:] == end
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


def _encode_examples(records: Records, tokenizer: Any, notes: list[str]) -> list[Example]:
    encode = _encode_prompts if records.kind == "prompt" else encode_conversations
    return list(encode(records, tokenizer, notes))


def _encode_prompts(records: Records, tokenizer: Any, notes: list[str]) -> Iterator[Example]:
    """Yield prompts with their completions, each pair encoded as the one text that a model meets when it is asked."""
    begin, end = beginning(tokenizer), _ending(tokenizer, notes)
    pairs = [(item["prompt"], item["completion"]) for item in records.items]
    wholes = _encode(tokenizer, [p + c for p, c in pairs], return_offsets_mapping=bool(tokenizer.is_fast))
    alone = itertools.repeat(None) if tokenizer.is_fast else _encode(tokenizer, [p for p, _ in pairs])
    for (prompt, completion), whole, before in zip(pairs, wholes, alone):
        ids = list(whole["input_ids"])
        if before is None:
            labels = labels_in(whole, [(len(prompt), len(prompt + completion))])
        else:
            # A slow tokenizer names no characters: the answer begins where the ids cease to be the prompt's own.
            shared = agreement(before["input_ids"], ids)
            labels = [IGNORED] * shared + ids[shared:]
        if not (end and labels[-1:] == end):
            ids, labels = ids + end, labels + end
        begun = _begun(ids, begin)
        yield Example(begun, [IGNORED] * (len(begun) - len(ids)) + labels)


@dataclass
class _Cut:
    """How many examples there are, are longer than a row, lose an answer's end by it, have nothing left; held nothing
    to learn to begin with.
    """

    examples: int = 0
    longer: int = 0
    without_end: int = 0
    emptied: int = 0
    unanswered: int = 0

    def notes(self, seq_len: int) -> list[str]:
        """Return what is to be told of them."""
        notes = []
        if self.longer:
            notes.append(
                f"{self.longer} of {self.examples} rows are longer than --seq-len {seq_len} and are cut:"
                f" {self.without_end} answers lose their end, {self.emptied} rows have nothing left to learn and are"
                " left out"
            )
        if self.unanswered:
            notes.append(f"{self.unanswered} of {self.examples} rows are left out: they hold no answer to learn")
        return notes


def _cut_examples(examples: Sequence[Example], seq_len: int) -> tuple[list[Example], _Cut]:
    """Return the examples that have something to learn in their first `seq_len` tokens, cut to these, and counts."""
    kept, counts = list[Example](), _Cut(len(examples))
    for example in examples:
        # the first token has no predecessor, and in a packed row the one before it is another example's
        labels = [IGNORED, *example.labels[1:]]
        learnt = [label != IGNORED for label in labels]
        fits = any(learnt[:seq_len])
        if not any(learnt):
            counts.unanswered += 1
        elif len(labels) > seq_len:
            counts.longer += 1
            counts.without_end += fits and any(learnt[seq_len:])
            counts.emptied += not fits
        if fits:
            kept.append(Example(example.input_ids[:seq_len], labels[:seq_len]))
    return kept, counts


def _rows(examples: list[Example], seq_len: int, packing: bool, counts: _Cut, notes: list[str]) -> TokenizedData:
    lengths = [len(example.input_ids) for example in examples]
    groups = full_rows(lengths, seq_len) if packing else [[index] for index in range(len(examples))]
    rows = [row_of([examples[index] for index in group], packing) for group in groups]
    dropped = counts.emptied + counts.unanswered
    truncated = counts.longer - counts.emptied
    return TokenizedData(rows, sum(lengths), _count_supervised(rows), len(examples), truncated, dropped, notes)


def packed(data: TokenizedData, seq_len: int) -> TokenizedData:
    """Return data whose rows are one example each with these put whole into shared rows of at most `seq_len` tokens."""
    return dataclasses.replace(data, rows=packed_rows(data.rows, seq_len))


def _nothing_supervised(examples: list[Example], seq_len: int) -> str:
    starts = [next((at for at, label in enumerate(e.labels) if at and label != IGNORED), None) for e in examples]
    known = [start for start in starts if start is not None]
    if not known:
        return "no supervised token: the examples hold no answer to learn; check the data and the chat template."
    return (
        f"no supervised token is left: each of the {len(examples)} prompts is as long as --seq-len {seq_len}"
        f" or longer (the shortest has {min(known)} tokens); give a longer --seq-len or shorter prompts."
    )


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
