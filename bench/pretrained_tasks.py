"""What a pretrained model is taught and asked in `bench.pretrained`: public files that are given as a folder.

| task | learns from | is asked |
|---|---|---|
| `gsm8k` | `gsm8k/train.jsonl` | loss of the answers of `gsm8k/test.jsonl` |
| `commonsense` | a fixed sample of the training sets in `commonsense/` | which of the choices is right, seven test sets, three of them of tasks that were not trained |
| `alpaca` | 9 of 10 rows of `alpaca_en_demo.json` | loss of the answers of the others |

All are asked too what the model knew before: the loss of the standard library's docstrings, a text that no task is about.
"""  # noqa: E501

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lisa_kernels.evaluate.choices import Choices, find_choices
from lisa_kernels.evaluate.encoding import scored_choices, scored_rows
from lisa_kernels.evaluate.likelihood import Scored, log_likelihoods
from lisa_kernels.train.models import load_tokenizer
from lisa_kernels.train.records import Records, load_records
from lisa_kernels.train.tokenize import TokenizedData, collate, packed, pad_token_id, split_records, tokenize_records

BASE = "sample:smollm2-135m"
LONGEST, KNOWN_TOKENS, KNOWN_ROWS = 2048, 256, 12
BATCH_TOKENS = 2048
FIRST_FIT, FULL_ROWS = "first fit", "full rows"


@dataclass(frozen=True)
class Size:
    """How long a run is, and how many held-out rows are asked: at its end, and on the way every so many steps.

    packed: how examples share rows, which decides what a seed is taught at which step: `FIRST_FIT` as the package had
    it until rows were filled to the last, `FULL_ROWS` as it does now. Rows of the two are not compared seed by seed.
    """

    steps: int = 60
    step_tokens: int = 288
    test_rows: int = 96
    curve_rows: int = 12
    curve_every: int = 15
    packed: str = FULL_ROWS

    def key(self) -> dict[str, int | str]:
        """Return what rows must share to be compared."""
        return {
            "steps": self.steps, "step_tokens": self.step_tokens, "test_rows": self.test_rows, "packed": self.packed
        }  # fmt: skip


@dataclass(frozen=True)
class Quiz:
    """A test set with choices: for each row what may be answered, and the index of the right answer."""

    name: str
    offered: list[tuple[Scored, ...]]
    right: list[int]


@dataclass(frozen=True)
class Task:
    """Rows to learn from, a packed one a step, and what is asked."""

    name: str
    train: TokenizedData
    asked: list[Scored]
    known: list[Scored]
    pad: int
    quizzes: list[Quiz] = field(default_factory=list)

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Yield a row at a time, shuffled, without end."""
        order = random.Random(f"rows:{seed}")
        while True:
            indices = list(range(len(self.train)))
            order.shuffle(indices)
            for index in indices:
                yield collate([self.train[index]], self.pad)

    def answer_loss(self, model: nn.Module, rows: int | None = None) -> tuple[float, list[float]]:
        """Return nats a token over `rows` answers spread over all that are asked, and the nats of each answer."""
        return _loss(model, spread(self.asked, rows or len(self.asked)), self.pad)

    def loss_of_some(self, nats: list[float], rows: int) -> float:
        """Return nats a token over `rows` of all answers, from the nats of each."""
        chosen = spread(list(zip(nats, self.asked)), rows)
        return float(sum(value for value, _ in chosen) / sum(len(row.places) for _, row in chosen))

    def outcome(self, model: nn.Module) -> dict[str, Any]:
        """Return what a trained model answers, as figures of a row."""
        loss, nats = self.answer_loss(model)
        accuracies = {quiz.name: _accuracy(model, quiz, self.pad) for quiz in self.quizzes}
        return {
            "answer_loss": loss, "nats": [round(value, 3) for value in nats],
            "known_loss": _loss(model, self.known, self.pad)[0], **({"accuracies": accuracies} if accuracies else {}),
        }  # fmt: skip


def spread(items: list[Any], count: int) -> list[Any]:
    """Return `count` of the items, evenly over all."""
    count = min(count, len(items))
    return [items[at * len(items) // count] for at in range(count)]


def read_task(name: str, folder: Path, size: Size) -> Task:
    """Return one of the tasks from the files in `folder`."""
    tokenizer = load_tokenizer(BASE, [], 0)
    if name == "commonsense":
        files = sorted((folder / name).glob("*_test.json"))
        learnt = [str(file) for file in sorted((folder / name).glob("*_train.json"))]
        quizzes = [_quiz(file, tokenizer, size.test_rows // len(files)) for file in files]
        train, held_out = load_records(learnt), load_records([str(file) for file in files])
    elif name == "alpaca":
        quizzes = []
        train, held_out = split_records(load_records(str(folder / "alpaca_en_demo.json")), 0.1, seed=0)
    else:
        quizzes = []
        train, held_out = (load_records(str(folder / name / f"{part}.jsonl")) for part in ("train", "test"))
    rows = tokenize_records(train, tokenizer, LONGEST, packing=False).rows
    fitting = TokenizedData([row for row in rows if len(row["input_ids"]) <= size.step_tokens])
    asked = spread(scored_rows(tokenize_records(held_out, tokenizer, LONGEST, packing=False)), size.test_rows)
    known = tokenize_records(load_records("stdlib:docstrings"), tokenizer, KNOWN_TOKENS)
    return Task(
        name, packed(fitting, size.step_tokens), asked, spread(scored_rows(known), KNOWN_ROWS),
        pad_token_id(tokenizer), quizzes,
    )  # fmt: skip


def _quiz(file: Path, tokenizer: Any, rows: int) -> Quiz:
    records = load_records(str(file), keep_rows=True)
    choices = find_choices(records, [])
    assert choices is not None
    kept: list[tuple[Any, Any, Choices]] = spread(list(zip(records.items, records.rows, choices)), rows)
    items, origins, chosen = (list(part) for part in zip(*kept))
    fewer = Records(records.kind, items, records.source, [], origins)
    offered = scored_choices(fewer.for_template(getattr(tokenizer, "chat_template", None)), chosen, tokenizer, LONGEST)
    return Quiz(file.stem.removesuffix("_test"), offered, [choice.right for choice in chosen])


def _loss(model: nn.Module, rows: list[Scored], pad: int) -> tuple[float, list[float]]:
    nats = [-value for value in log_likelihoods(model, rows, pad, BATCH_TOKENS)]
    return sum(nats) / sum(len(row.places) for row in rows), nats


def _accuracy(model: nn.Module, quiz: Quiz, pad: int) -> float:
    values = iter(log_likelihoods(model, [choice for row in quiz.offered for choice in row], pad, BATCH_TOKENS))
    totals = [[next(values) for _ in row] for row in quiz.offered]
    hits = [total.index(max(total)) == right for total, right in zip(totals, quiz.right)]
    return sum(hits) / len(hits)
