"""Rows by their columns: every form that people have, in every file that holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lisa_kernels.errors import InputError
from lisa_kernels.train.records import load_records
from lisa_kernels.train.sources.kinds import parse_columns

ASKED = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def loaded(folder: Path, *rows: Any, columns: str | None = None) -> Any:
    (folder / "d.json").write_text(json.dumps(rows))
    return load_records(str(folder / "d.json"), columns=None if columns is None else parse_columns(columns))


@pytest.mark.parametrize(
    "row",
    [
        {"question": "2+2?", "answer": "4"},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"question": "2+2?", "answer": 4},
    ],
    ids=["question", "alpaca", "number"],
)
def test_instructions_are_conversations_or_prompts_by_the_template(row: Any, tmp_path: Path) -> None:
    records = loaded(tmp_path, row)
    assert records.for_template("{{ messages }}").items == [ASKED]
    plain = records.for_template(None)
    assert (plain.kind, plain.items) == ("prompt", [{"prompt": "2+2?\n\n", "completion": "4"}])


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"messages": [{"role": "User", "content": [{"type": "text", "text": "2+2?"}]}, ASKED[1]]},
        {"messages": json.dumps(ASKED), "tools": None},
        {"prompt": ASKED[:1], "completion": ASKED[1:]},
    ],
    ids=["sharegpt", "parts-and-capitals", "json-text", "prompt-of-messages"],
)
def test_conversations_of_every_form_are_one(row: Any, tmp_path: Path) -> None:
    records = loaded(tmp_path, row)
    assert (records.kind, records.items) == ("messages", [ASKED])


def test_calls_and_tools_take_one_form_and_nulls_of_tables_go(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}], "name": None}
    row = {"messages": [ASKED[0], call], "tools": json.dumps([{"name": "f", "parameters": {"type": "object"}}])}
    item = loaded(tmp_path, row).items[0]
    function = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert item["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [function]}
    assert item["tools"] == [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": ASKED, "tools": [{"a": 1}]}, "tool 1 is no JSON schema"),
        ({"messages": [ASKED[0], {**ASKED[1], "weight": 0.5}]}, "0 .not learnt. or 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ASKED[1]]}, "type 'image'"),
        ({"question": "a", "answer": " "}, "with an answer"),
        ({"body": "a"}, "has 'body'.*--columns prompt=NAME"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_one_sentence(row: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        loaded(tmp_path, row)


def test_columns_name_any_table_and_empty_answers_are_counted(tmp_path: Path) -> None:
    rows = [{"q": "2+2?", "n": 4}, {"q": "none", "n": ""}]
    records = loaded(tmp_path, *rows, columns="prompt=q,completion=n")
    assert records.items == [{"prompt": "2+2?", "completion": "4"}]
    assert "1 of 2 rows are left out: their answer is empty" in records.notes[0]
    with pytest.raises(InputError, match=r"no column 'z'.*'q', 'n'"):
        loaded(tmp_path, *rows, columns="prompt=z,completion=n")
    for text, said in (("prompt", "FIELD=NAME"), ("promt=a", "did you mean 'prompt'"), ("prompt=a", "make no row")):
        with pytest.raises(InputError, match=said):
            parse_columns(text)


def test_a_folder_leaves_out_what_its_name_holds_back_and_csv_keeps_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('question,answer\n"2+2?\u2028\nsay","4"\n')
    (tmp_path / "x_test.csv").write_text("question,answer\nno,no\n")
    records = load_records(str(tmp_path))
    assert [item[0]["content"] for item in records.items] == ["2+2?\u2028\nsay"]
    assert "x_test.csv" in records.notes[0]
