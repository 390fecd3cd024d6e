"""What a row is by its columns: a text, a prompt and its completion, a conversation, an instruction and its answer.

| kind | columns | item |
|---|---|---|
| messages | `messages`, `conversations`, `conversation`; `tools`, `system` | the messages, or an object with `tools` |
| prompt | `prompt` and `completion`, both text | an object of the two |
| messages | `prompt` and `completion`, both messages | its messages, those of the prompt not learnt |
| instruction | `instruction` and `output` (`input`, `system`, `history`), `question` and `answer`, ... | as messages |
| text | `text` | str |

The first kind in this order whose columns are all there is taken. An instruction becomes a conversation where the
tokenizer has a chat template, else a prompt of its parts with blank lines between them and after the last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.train.sources.messages import checked_messages, checked_string, checked_tools

# The columns that make a kind, in the order in which kinds are looked for.
FIELDS: dict[tuple[str, ...], str] = {
    ("messages",): "messages",
    ("conversations",): "messages",
    ("conversation",): "messages",
    ("prompt", "completion"): "prompt",
    ("instruction", "output"): "instruction",
    ("instruction", "response"): "instruction",
    ("question", "answer"): "instruction",
    ("question", "response"): "instruction",
    ("query", "response"): "instruction",
    ("query", "answer"): "instruction",
    ("prompt", "response"): "instruction",
    ("prompt", "answer"): "instruction",
    ("input", "output"): "instruction",
    ("text",): "text",
}
BESIDE = ("tools", "system", "input", "context", "history")
KNOWN = frozenset(name for fields in FIELDS for name in fields) | frozenset(BESIDE)
WANTED = (
    "'text', or 'prompt' and 'completion', or 'messages', or 'instruction' and 'output', or 'question' and 'answer',"
    " or 'conversations' wanted; name others with --columns, as in --columns prompt=NAME,completion=NAME"
)


def parse_columns(text: str) -> dict[str, str]:
    """Return what `--columns FIELD=NAME,...` says: for each field of a row the column that holds it."""
    columns = dict[str, str]()
    for pair in text.split(","):
        field, equals, name = (part.strip() for part in pair.partition("="))
        if not equals or not field or not name:
            raise InputError(
                f"--columns has {pair.strip()!r}: FIELD=NAME pairs are wanted, as in prompt=NAME,completion=NAME."
            )
        if field not in KNOWN:
            raise unknown_name("field of --columns", field, sorted(KNOWN))
        if field in columns:
            raise InputError(f"--columns names {field!r} twice: give each field one column.")
        columns[field] = name
    if fields_of(columns) is None:
        raise InputError(f"--columns names {', '.join(map(repr, columns))}, which make no row: {WANTED}.")
    return columns


def fields_of(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the columns of the first kind that a row has, None where it has none."""
    return next((fields for fields in FIELDS if all(name in row for name in fields)), None)


def other_fields_of(row: Mapping[str, Any], chosen: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the columns of the further kinds that a row could be, each without a column of the chosen ones."""
    return [
        fields for fields in FIELDS
        if fields != chosen and not set(fields) & set(chosen) and all(name in row for name in fields)
    ]  # fmt: skip


def named(row: dict[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return a row under the fields that `columns` gives its columns; numbers in it become text."""
    missing = [name for name in columns.values() if name not in row]
    if missing:
        found = ", ".join(map(repr, row)) or "no columns"
        raise InputError(
            f"{where} has no column {missing[0]!r} that --columns names: it has {found}; name one of these."
        )
    values = {field: row[name] for field, name in columns.items()}
    return {field: json.dumps(v) if isinstance(v, (bool, int, float)) else v for field, v in values.items()}


def checked_item(kind: str, fields: tuple[str, ...], row: dict[str, Any], where: str) -> Any:
    """Return the item that a row of a kind makes, None where it has no answer to learn."""
    if kind == "text":
        return checked_string(row["text"], "'text'", where)
    if kind == "messages":
        return _conversation(row, fields[0], where)
    if kind == "prompt" and isinstance(row["prompt"], list):
        return _continued(row, where)
    if kind == "prompt":
        item = {name: checked_string(row[name], repr(name), where) for name in fields}
        return item if item["completion"].strip() else None
    return _instruction(row, fields, where)


def _conversation(row: dict[str, Any], field: str, where: str) -> Any:
    messages = checked_messages(row[field], field, where)
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not any(m["role"] == "system" for m in messages):
        messages = [{"role": "system", "content": checked_string(system, "'system'", where)}, *messages]
    return _with_tools(messages, row, where)


def _continued(row: dict[str, Any], where: str) -> Any:
    """Return a prompt and a completion that are messages as one conversation, learnt in the completion alone."""
    before, after = (checked_messages(row[name], name, where) for name in ("prompt", "completion"))
    return _with_tools([*({**m, "weight": 0} if m["role"] == "assistant" else m for m in before), *after], row, where)


def _with_tools(messages: list[dict[str, Any]], row: dict[str, Any], where: str) -> Any:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise InputError(f"{where}: no message has the role 'assistant', so there is nothing to learn: add its answer.")
    if not any(message["content"].strip() or message.get("tool_calls") for message in answers):
        return None
    tools = checked_tools(row.get("tools"), where)
    return {"messages": messages, "tools": tools} if tools else messages


def _instruction(row: dict[str, Any], fields: tuple[str, ...], where: str) -> Any:
    """Return an instruction and its answer as messages, after the pairs of question and answer in `history`."""
    asked, answer = (_as_text(row[name], repr(name), where) for name in fields)
    beside = {name: _as_text(row.get(name) or "", repr(name), where) for name in BESIDE[1:4] if name not in fields}
    more = beside.get("input") or beside.get("context", "") if "instruction" in fields else ""
    messages = [{"role": "system", "content": beside["system"]}] if beside["system"].strip() else []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise InputError(f"{where}: 'history' is no list of pairs: each turn as [question, answer] is wanted.")
    for past_question, past_answer in history:
        messages.append({"role": "user", "content": checked_string(past_question, "'history'", where)})
        messages.append({"role": "assistant", "content": checked_string(past_answer, "'history'", where)})
    messages.append({"role": "user", "content": "\n\n".join(part for part in (asked, more) if part.strip())})
    messages.append({"role": "assistant", "content": answer})
    return messages if answer.strip() else None


def _as_text(value: object, name: str, where: str) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return json.dumps(value) if number else checked_string(value, name, where)
