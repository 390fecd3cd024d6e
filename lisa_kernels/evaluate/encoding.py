"""Rows as token ids with the places that are scored: answers as in training, choices without what ends them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lisa_kernels.errors import InputError
from lisa_kernels.evaluate.choices import Choices, with_answer
from lisa_kernels.evaluate.likelihood import Scored
from lisa_kernels.train.chat import IGNORED, ConversationWriter, beginning, labels_in
from lisa_kernels.train.records import Records
from lisa_kernels.train.tokenize import TokenizedData


def scored_rows(data: TokenizedData) -> list[Scored]:
    """Return what a training loss would be taken of: every supervised token but a row's first."""
    rows = []
    for index in range(len(data)):
        ids, labels = (data[index][name].tolist() for name in ("input_ids", "labels"))
        rows.append(Scored(tuple(ids), tuple(at for at in range(1, len(ids)) if labels[at] != IGNORED)))
    return rows


def scored_choices(
    records: Records, choices: Sequence[Choices], tokenizer: Any, longest: int
) -> list[tuple[Scored, ...]]:  # fmt: skip
    """Return for each record its choices after its question, each with the tokens that hold a character of it scored.

    A choice stands where the answer does: in the tokenizer's chat template for conversations. longest: the most tokens
    that the model reads. Raises InputError for a choice that is longer, or that cannot be told from what is before it.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer {type(tokenizer).__name__} is a slow one, which cannot say where a choice's tokens lie: "
            "use its fast version."
        )
    writer = ConversationWriter(tokenizer)
    begin = beginning(tokenizer)
    encoded = []
    for number, (item, offered) in enumerate(zip(records.items, choices), start=1):
        texts = [_text_of(with_answer(item, text), text, writer, number) for text in offered.texts]
        rows = tuple(_scored(text, start, tokenizer, begin) for text, start in texts)
        if (most := max(len(row.ids) for row in rows)) > longest:
            raise InputError(
                f"{records.rows[number - 1][0]} has {most} tokens with its longest choice; the model reads {longest}. "
                "Leave such rows out."
            )
        encoded.append(rows)
    return encoded


def _text_of(item: Any, choice: str, writer: ConversationWriter, number: int) -> tuple[str, tuple[int, int]]:
    """Return a record as text and where in it the choice stands."""
    if isinstance(item, dict) and "completion" in item:
        text = item["prompt"] + item["completion"]
        return text, (len(item["prompt"]), len(text))
    rendered = writer.render(item, number)
    first, last = rendered.spans[-1]
    start = rendered.text.rfind(choice, first, last)
    if start < 0:
        raise InputError(f"the chat template does not write the choice {choice!r} of conversation {number} as it is.")
    return rendered.text, (start, start + len(choice))


def _scored(text: str, span: tuple[int, int], tokenizer: Any, begin: list[int]) -> Scored:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, labels = list(encoded["input_ids"]), labels_in(encoded, [span])
    missing = begin if ids[: len(begin)] != begin else []
    ids, labels = missing + ids, [IGNORED] * len(missing) + labels
    places = tuple(at for at, label in enumerate(labels) if label != IGNORED and at)
    if not places:
        raise InputError(f"nothing stands before {text[:80]!r}: a choice needs a question that it answers.")
    return Scored(tuple(ids[: places[-1] + 1]), places)
