"""Reading what `--data` names: every accepted form, and one clear sentence for everything else."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lisa_kernels.errors import InputError
from lisa_kernels.train.records import load_records

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write_jsonl(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", "utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "row", "item"),
    [
        ("text", {"text": "a\nb", "id": 3}, "a\nb"),
        ("prompt", {"prompt": "2+2=", "completion": "4"}, {"prompt": "2+2=", "completion": "4"}),
        ("messages", {"messages": CHAT}, CHAT),
        ("messages", {"messages": CHAT, "prompt": "p", "completion": "c", "text": "t"}, CHAT),
    ],
    ids=["text", "prompt", "messages", "several-kinds-in-each-row"],
)
def test_jsonl_and_parquet_give_the_same_items(kind: str, row: dict[str, Any], item: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "d.parquet")
    for spec in (write_jsonl(tmp_path / "d.jsonl", row, "", row), str(tmp_path / "d.parquet")):
        records = load_records(spec)
        assert (records.kind, records.items, records.source) == (kind, [item, item], spec)


def test_a_txt_file_is_one_document_blank_lines_and_all(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes("\ufeffdef f():\n\n\n    return 'é'\n".encode())
    assert load_records(str(tmp_path / "d.txt")).items == ["def f():\n\n\n    return 'é'\n"]


def test_texts_of_every_kind_are_strings_for_a_tokenizer(tmp_path: Path) -> None:
    prompt = load_records(write_jsonl(tmp_path / "p.jsonl", {"prompt": "a", "completion": "b"}))
    chat = load_records(write_jsonl(tmp_path / "m.jsonl", {"messages": CHAT}))
    assert (prompt.texts(), chat.texts()) == (["ab"], ["hi\nhello"])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a"}, '{"text": '], ["line 2", "not JSON", "char"]),
        ([{"text": "a"}, "", "[1]"], ["line 3", "a list", "object"]),
        ([{"body": "a", "id": 1}], ["line 1", "'body', 'id'", "'text'", "'prompt' and 'completion'", "'messages'"]),
        ([{"": 1}], ["line 1", "wanted"]),
        ([{"prompt": "a"}], ["line 1", "'prompt'", "'completion'"]),
        ([{"text": "a"}, {"prompt": "a", "completion": "b"}], ["line 2", "prompt", "text", "one kind"]),
        ([{"text": 5}], ["line 1", "'text'", "a number", "string"]),
        ([{"text": "\ud800"}], ["line 1", "surrogate"]),
        ([{"prompt": "a", "completion": None}], ["line 1", "'completion'", "null", "string"]),
        ([{"messages": "hi"}], ["line 1", "'messages'", "a string", "list"]),
        ([{"messages": [{"role": "user"}]}], ["line 1", "message 1", "'content'"]),
        ([{"messages": [{"role": "assistant", "content": ["x"]}]}], ["line 1", "'content' of message 1", "a list"]),
        ([{"messages": CHAT[:1]}], ["line 1", "assistant"]),
        ([""], ["empty"]),
        ([{"text": " \n"}], ["empty"]),
    ],
    ids=[
        "malformed",
        "not-an-object",
        "field-missing",
        "nameless-field",
        "completion-missing",
        "mixed-kinds",
        "text-is-a-number",
        "half-a-surrogate",
        "completion-is-null",
        "messages-is-a-string",
        "content-missing",
        "content-is-a-list",
        "no-assistant-turn",
        "empty",
        "only-blank-text",
    ],
)
def test_a_bad_line_is_named_with_what_it_has_and_what_is_wanted(
    rows: list[Any], said: list[str], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        load_records(write_jsonl(tmp_path / "d.jsonl", *rows))
    assert [word for word in said if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.jsonl", None, "does not exist"),
        ("no/such/place", None, "does not exist"),
        ("table.csv", b"a,b", "empty"),
        ("table.npy", b"a,b", "'.npy'"),
        ("noend", b"a", "'no suffix'"),
        ("d.txt", b"", "empty"),
        ("d.txt", b"caf\xe9", "UTF-8 at byte 3"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2 is not UTF-8"),
        ("d.parquet", b"PAR1 no", "cannot be read as parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(
    name: str, content: bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        load_records(str(tmp_path / name))
    assert said in str(error.value)
    assert name in str(error.value)


def test_a_missing_file_in_the_working_directory_is_not_taken_for_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for spec in ("train.jsonl", "data/train.csv", "./corpus", "a/b/c"):
        with pytest.raises(InputError, match=r"does not exist: give a \.jsonl"):
            load_records(spec)


def test_an_empty_directory_is_refused_with_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a directory without rows: give a \.jsonl, \.json, \.csv"):
        load_records(str(tmp_path))


def test_parquet_without_a_known_column_names_its_columns(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match=r"has .body.: .text., or .prompt.*--columns prompt=NAME"):
        load_records(str(tmp_path / "d.parquet"))


def test_a_hub_id_is_loaded_by_datasets_and_its_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(spec: str, split: str) -> list[dict[str, str]]:
        if spec == "owner/good":
            return [{"text": split}]
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_records("owner/good").items == ["train"]
    with pytest.raises(InputError, match=r"hub could not be reached .*\(no route\).*stdlib work offline"):
        load_records("owner/bad")


def test_max_bytes_cuts_the_last_text_at_a_character_and_keeps_other_examples_whole(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "t.jsonl", {"text": "abc"}, {"text": "dééf"}, {"text": "never"})
    assert load_records(texts, max_bytes=7).items == ["abc", "dé"]
    prompts = write_jsonl(tmp_path / "p.jsonl", *[{"prompt": "ab", "completion": "c"}] * 4)
    assert len(load_records(prompts, max_bytes=8)) == 2
    assert len(load_records(prompts, max_bytes=1)) == 1
    with pytest.raises(InputError, match="max_bytes is 0"):
        load_records(texts, max_bytes=0)


def test_several_sources_are_one_in_their_order_and_share_the_cap(tmp_path: Path) -> None:
    first, second = (write_jsonl(tmp_path / f"{n}.jsonl", {"text": n * 4}) for n in "ab")
    assert load_records([first, second]).items == ["aaaa", "bbbb"]
    assert load_records([second, first], max_bytes=6).items == ["bbbb", "aa"]
    assert load_records([first, second], max_bytes=4).items == ["aaaa"]
    with pytest.raises(InputError, match="one kind"):
        load_records([first, write_jsonl(tmp_path / "p.jsonl", {"prompt": "a", "completion": "b"})])


def test_a_digest_tells_of_any_change_of_items_or_order(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    digest = load_records(write_jsonl(path, *rows)).digest()
    assert digest == load_records(write_jsonl(path, *rows)).digest()
    others = [rows[::-1], rows[:1], [rows[0], {**rows[1], "completion": "e"}]]
    assert digest not in {load_records(write_jsonl(path, *other)).digest() for other in others}
