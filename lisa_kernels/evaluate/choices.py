"""The answers that a row offers to choose from, and which of them is right.

| form | choices |
|---|---|
| `choices`: texts, or `text` and `label` beside each other as lists or in each choice | these; right is what `answer`, `answerKey`, `label` or `gold` says by number from 0, label, letter or text, else the row's own answer |
| instruction that ends with `Answer format: a/b/c`, answer that holds `answer` | the answer with each of a, b, c in its place |
| any, with choices given for all rows | these; right is the row's own answer |
"""  # noqa: E501

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lisa_kernels.errors import InputError
from lisa_kernels.train.records import Records, messages_of

ANSWER_FORMAT = re.compile(r"Answer format:\s*(\S+(?:/\S+)+)\s*$", re.IGNORECASE)
RIGHT = ("answer", "answerKey", "answer_key", "label", "gold")
ADVICE = "give the answer as one of them, its number from 0, its label or its letter"


@dataclass(frozen=True)
class Choices:
    """What a row offers as answers, and the index of the right one."""

    texts: tuple[str, ...]
    right: int


def answer_of(item: Any) -> str:
    """Return the answer of a record that has one: its completion, or what its last message says."""
    if isinstance(item, dict) and "completion" in item:
        return str(item["completion"])
    return str(messages_of(item)[-1]["content"])


def with_answer(item: Any, text: str) -> Any:
    """Return the record with another answer; a completion keeps the blanks that part it from the prompt."""
    if isinstance(item, dict) and "completion" in item:
        completion = item["completion"]
        return {**item, "completion": completion[: len(completion) - len(completion.lstrip())] + text.strip()}
    *before, last = messages_of(item)
    messages = [*before, {**last, "content": text}]
    return {**item, "messages": messages} if isinstance(item, dict) else messages


def find_choices(records: Records, given: Sequence[str] = ()) -> list[Choices] | None:
    """Return the choices of each record, None where no row has any; `records.rows` are what they are read from.

    given: choices of all rows. Raises InputError for a right answer that is none of the choices, and where some rows
    have choices and others have none.
    """
    if records.kind == "text":
        if given:
            raise InputError(f"data {records.source!r} is text without answers: choices need rows that have one.")
        return None
    found = [_choices_of(row, item, given, where) for item, (where, row) in zip(records.items, records.rows)]
    missing = next((at for at, choices in enumerate(found) if choices is None), None)
    if missing is None:
        return [choices for choices in found if choices is not None]
    if any(found):
        raise InputError(
            f"{records.rows[missing][0]} has no choices and other rows do: an accuracy over some of the rows would "
            "pass for that of all; give each row its choices, or --choices for all."
        )
    return None


def _choices_of(row: dict[str, Any], item: Any, given: Sequence[str], where: str) -> Choices | None:
    answer = answer_of(item)
    if given:
        return _checked(list(given), answer.strip(), where)
    if row.get("choices") is not None:
        return _listed(row, answer, where)
    return _formatted(row, item, where)


def _listed(row: dict[str, Any], answer: str, where: str) -> Choices:
    """Return the choices of a column of their own."""
    texts, labels = _texts_and_labels(row["choices"], where)
    right = next((row[name] for name in RIGHT if row.get(name) is not None), answer)
    spoken = str(right).strip()
    if spoken in texts:
        return _checked(texts, spoken, where)
    if spoken in labels:
        return _checked(texts, texts[labels.index(spoken)], where)
    if spoken.isdecimal() and int(spoken) < len(texts):
        return _checked(texts, texts[int(spoken)], where)
    return _checked(texts, spoken, where)


def _texts_and_labels(found: Any, where: str) -> tuple[list[str], list[str]]:
    """Return the texts of choices and how each is called, which is a letter where nothing else is said."""
    if isinstance(found, str) and found.lstrip().startswith(("[", "{")):
        try:
            found = json.loads(found)
        except ValueError as error:
            raise InputError(f"{where}: 'choices' is no JSON ({error}); a list of texts is wanted.") from error
    if isinstance(found, list) and found and all(isinstance(choice, dict) for choice in found):
        found = {name: [choice.get(name) for choice in found] for name in ("text", "label")}
    labels: list[Any] = []
    if isinstance(found, dict):
        found, labels = found.get("text"), found.get("label") or []
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise InputError(f"{where}: 'choices' is no list of texts, nor one of 'text' with 'label' beside it.")
    if len(labels) != len(found) or None in labels:
        labels = list(string.ascii_uppercase[: len(found)])
    return [text.strip() for text in found], [str(label).strip() for label in labels]


def _formatted(row: dict[str, Any], item: Any, where: str) -> Choices | None:
    """Return the choices that an instruction's last line names, each as the row's answer would give it."""
    asked = row.get("instruction")
    named = ANSWER_FORMAT.search(asked.strip()) if isinstance(asked, str) else None
    right = row.get("answer")
    if named is None or not isinstance(right, str):
        return None
    options, right, answer = named[1].split("/"), right.strip(), answer_of(item).strip()
    if right not in options:
        raise InputError(f"{where}: its answer {right!r} is not among the choices {', '.join(options)}.")
    before, found, after = answer.rpartition(right)
    if not found:
        raise InputError(f"{where}: its output {answer[:80]!r} does not hold its answer {right!r}.")
    return Choices(tuple(f"{before}{option}{after}" for option in options), options.index(right))


def _checked(texts: list[str], right: str, where: str) -> Choices:
    if len(set(texts)) != len(texts) or len(texts) < 2 or not all(texts):
        raise InputError(f"{where}: its choices are {texts}; two or more different texts are wanted.")
    if right not in texts:
        raise InputError(
            f"{where}: its answer {right[:80]!r} is not among the choices {', '.join(map(repr, texts))}; {ADVICE}."
        )
    return Choices(tuple(texts), texts.index(right))
