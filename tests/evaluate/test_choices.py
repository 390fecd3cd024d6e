"""What a row offers to choose from, in the forms in which people publish it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lisa_kernels.errors import InputError
from lisa_kernels.evaluate.choices import Choices, answer_of, find_choices, with_answer
from lisa_kernels.train.records import load_records

LISTED = {"question": "Wet?", "choices": ["rain", "sun"]}
BESIDE = {"question": "Wet?", "choices": {"text": ["rain", "sun"], "label": ["1", "2"]}}
FORMATTED = {"instruction": "Wet?\n\nAnswer format: answer1/answer2", "output": "it is answer2", "answer": "answer2"}
RAIN, SUN = Choices(("rain", "sun"), 0), Choices(("rain", "sun"), 1)


def found(folder: Path, *rows: dict[str, Any], given: tuple[str, ...] = ()) -> list[Choices] | None:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return find_choices(load_records(str(path), keep_rows=True), given)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**LISTED, "answer": 1}, SUN),
        ({**LISTED, "answer": "B"}, SUN),
        ({**LISTED, "answer": "rain"}, RAIN),
        ({**LISTED, "answer": "0"}, RAIN),
        ({"prompt": "Wet?", "completion": " sun", "choices": ["rain", "sun"]}, SUN),
        ({**BESIDE, "answer": "-", "answerKey": "2", "label": None}, None),
        ({**BESIDE, "answer": "2"}, SUN),
        ({**LISTED, "choices": [{"label": "C", "text": "rain"}, {"label": "D", "text": "sun"}], "answer": "D"}, SUN),
        ({**LISTED, "choices": '["rain", "sun"]', "answer": "sun"}, SUN),
        (FORMATTED, Choices(("it is answer1", "it is answer2"), 1)),
        ({"question": "Wet?", "answer": "sun"}, None),
    ],
)
def test_choices_are_found_in_published_forms(row: dict[str, Any], expected: Choices | None, tmp_path: Path) -> None:
    """A label goes before a number: answers are called 1 and 2 where labels are."""
    if row.get("answer") == "-":
        with pytest.raises(InputError, match="'-' is not among"):
            found(tmp_path, row)
        return
    assert found(tmp_path, row) == (None if expected is None else [expected])


def test_choices_of_all_rows_are_given_once(tmp_path: Path) -> None:
    rows = [{"prompt": "Good film. ", "completion": "positive"}, {"prompt": "Bad one. ", "completion": "negative"}]
    assert found(tmp_path, *rows, given=("negative", "positive")) == [
        Choices(("negative", "positive"), 1), Choices(("negative", "positive"), 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "given", "said"),
    [
        ([{**LISTED, "answer": 2}], (), "answer '2' is not among the choices 'rain', 'sun'"),
        ([{**LISTED, "answer": "snow"}], (), "'snow' is not among"),
        ([{**FORMATTED, "answer": "answer3"}], (), "'answer3' is not among the choices answer1, answer2"),
        ([{**FORMATTED, "output": "none"}], (), "does not hold its answer"),
        ([{**LISTED, "choices": ["rain", "rain"], "answer": 0}], (), "two or more different"),
        ([{**LISTED, "choices": [1, 2], "answer": 0}], (), "no list of texts"),
        ([{**LISTED, "choices": "[rain", "answer": 0}], (), "no JSON"),
        ([{**LISTED, "answer": 0}, {"question": "a", "answer": "b"}], (), "row 2 has no choices and other rows do"),
        ([{"question": "a", "answer": "b"}], ("c", "d"), "'b' is not among"),
        ([{"text": "words"}], ("c", "d"), "text without answers"),
    ],
)
def test_what_is_no_choice_is_named(
    rows: list[dict[str, Any]], given: tuple[str, ...], said: str, tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(InputError, match=said):
        found(tmp_path, *rows, given=given)


def test_an_answer_takes_anothers_place_in_every_kind_of_record() -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert with_answer({"prompt": "q:", "completion": " a"}, "b") == {"prompt": "q:", "completion": " b"}
    for item in ({"prompt": "q", "completion": "a"}, chat, {"messages": chat, "tools": [{}]}):
        other = with_answer(item, "b")
        assert (answer_of(item), answer_of(other)) == ("a", "b")
        assert with_answer(other, "a") == item
