"""Held-out prompts, and what a model answers to them."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from lisa_kernels.train.answers import (
    ANSWER_TOKENS,
    SHOWN_CHARACTERS,
    TEXT_PROMPT_TOKENS,
    held_out_questions,
    print_answers,
    samples_for,
)
from lisa_kernels.train.chat import IGNORED
from lisa_kernels.train.tokenize import TokenizedData


def row(ids: list[int], supervised: list[bool], positions: list[int] | None = None) -> dict[str, Any]:
    labels = [token if on else IGNORED for token, on in zip(ids, supervised)]
    found = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    return found if positions is None else {**found, "position_ids": torch.tensor(positions)}


def asked(rows: list[dict[str, Any]], count: int = 3) -> list[tuple[list[int], list[int]]]:
    questions = held_out_questions(TokenizedData(rows), count)
    return [(question.prompt.tolist(), question.wanted.tolist()) for question in questions]


def test_a_prompt_is_what_stands_before_the_first_answer() -> None:
    """Of a conversation the second answer is left out, of a packed row the second example."""
    turns = row([1, 2, 3, 4, 5, 6], [False, False, True, True, False, True])
    packed = row([1, 2, 8, 9, 7, 7], [False, False, False, True, False, True], [0, 1, 2, 3, 0, 1])
    assert asked([turns, packed]) == [([1, 2], [3, 4]), ([1, 2, 8], [9])]


def test_of_text_the_beginning_is_the_prompt() -> None:
    ids = list(range(100))
    told = ids[TEXT_PROMPT_TOKENS:][:ANSWER_TOKENS]
    assert asked([row(ids, [True] * 100)]) == [(ids[:TEXT_PROMPT_TOKENS], told)]
    assert asked([row(ids[:10], [False] + [True] * 9)]) == [(ids[:5], ids[5:10])]


def test_prompts_differ_and_rows_without_any_are_left_out() -> None:
    rows = [row([1, 2, 3], [False, False, True]), row([1, 2, 4], [False, False, True]), row([5], [True]),
            row([6, 7], [False, False]), row([8, 9, 3], [False, False, True])]  # fmt: skip
    assert asked(rows) == [([1, 2], [3]), ([8, 9], [3])]
    assert asked(rows, 1) == [([1, 2], [3])]
    assert asked(rows, 0) == []


class Sized(nn.Module):
    """A model of which only the size is known."""

    def __init__(self, parameters: int, device: str = "cpu") -> None:
        super().__init__()
        self.parameter = SimpleNamespace(numel=lambda: parameters, device=torch.device(device))

    def parameters(self, recurse: bool = True) -> Any:
        return iter([self.parameter])


@pytest.mark.parametrize(
    ("model", "given", "samples"),
    [(Sized(10**8), None, 3), (Sized(2 * 10**9), None, 0), (Sized(2 * 10**9, "cuda"), None, 3),
     (Sized(2 * 10**9), 2, 2), (Sized(10), 0, 0)],
)  # fmt: skip
def test_a_large_model_on_a_cpu_answers_when_asked_to(model: nn.Module, given: int | None, samples: int) -> None:
    assert samples_for(model, given) == samples


def test_answers_stand_side_by_side() -> None:
    """A prompt keeps its end, where the question is, an answer its beginning; brackets are text and no style."""
    out = io.StringIO()
    long = {"prompt": "system " * SHOWN_CHARACTERS + "Why?", "before": "[bold]old", "after": "new " + "x" * 999}
    print_answers([long, {"prompt": "How?", "before": None, "after": "So."}], Console(file=out, width=3000))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines() if "│" in line]
    assert [row[1] for row in lines] == ["[bold]old", ""]
    assert lines[0][0].startswith("… ")
    assert lines[0][0].endswith("system Why?")
    assert lines[0][2].startswith("new xxx")
    assert lines[0][2].endswith("x …")
    assert lines[1][::2] == ["How?", "So."]


def test_without_answers_nothing_is_printed() -> None:
    out = io.StringIO()
    print_answers([], Console(file=out))
    assert out.getvalue() == ""


def test_a_long_word_is_broken_and_not_cut() -> None:
    out = io.StringIO()
    print_answers([{"prompt": "a" * 99, "before": "b" * 99, "after": "c" * 99}], Console(file=out, width=60))
    assert [out.getvalue().count(letter * 10) > 0 for letter in "abc"] == [True] * 3
    assert "…" not in out.getvalue()
