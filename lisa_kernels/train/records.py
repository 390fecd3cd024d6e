"""Read what `--data` names into records: plain texts, prompts with completions, or conversations."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisa_kernels.errors import InputError
from lisa_kernels.train.sources.stdlib import QUESTIONS, stdlib_objects

ACCEPTED = (
    "a .jsonl, .txt or .parquet file, a Hugging Face data set id, or stdlib, stdlib:code, stdlib:docstrings,"
    " stdlib:questions"
)
FIELDS = {"messages": ("messages",), "prompt": ("prompt", "completion"), "text": ("text",)}
WANTED_FIELDS = "'text', or 'prompt' and 'completion', or 'messages'"
DATA_SUFFIXES = {".jsonl", ".txt", ".parquet"}
OTHER_DATA_SUFFIXES = {".json", ".csv", ".tsv", ".arrow", ".md", ".py", ".gz", ".zst", ".zip", ".tar", ".xz", ".npy"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Records:
    """The documents or examples of one data source, all of one kind.

    kind: "text" (items: str), "prompt" (items: dict with str prompt and completion) or
    "messages" (items: list of dict with str role and content, at least one from the assistant).
    turns: prompts and completions are a user's and an assistant's turns, where a tokenizer has a template for such.
    """

    kind: str
    items: list[Any]
    source: str
    turns: bool = False

    def __len__(self) -> int:
        return len(self.items)

    def digest(self) -> str:
        """Return a checksum of the items and their order: SHA-256 as 64 hexadecimal digits."""
        checksum = hashlib.sha256(self.kind.encode())
        for item in self.items:
            checksum.update(json.dumps(item, sort_keys=True, default=str).encode() + b"\n")
        return checksum.hexdigest()

    def for_template(self, template: str | None) -> Records:
        """Return the records as this chat template writes them: turns become conversations where there is one."""
        if not self.turns or not template:
            return self
        items = [
            [
                {"role": "user", "content": item["prompt"].strip()},
                {"role": "assistant", "content": item["completion"].strip()},
            ]
            for item in self.items
        ]
        return Records("messages", items, self.source)

    def texts(self) -> list[str]:
        """Return the text of each item, for training a tokenizer."""
        if self.kind == "text":
            return list(self.items)
        if self.kind == "prompt":
            return [item["prompt"] + item["completion"] for item in self.items]
        return ["\n".join(message["content"] for message in item) for item in self.items]


def load_records(specs: str | Sequence[str], *, max_bytes: int | None = None) -> Records:
    """Load the records that one or several `specs` name, in their own order.

    max_bytes: stop after this many bytes of UTF-8 text; the last text is cut, other examples are kept or left whole.
    Raises InputError for anything that cannot be read as records, and for sources of different kinds.
    """
    if max_bytes is not None and max_bytes < 1:
        raise InputError(f"max_bytes is {max_bytes}: give at least 1, or nothing for all of the data.")
    loaded = list[Records]()
    for spec in [specs] if isinstance(specs, str) else specs:
        used_bytes = sum(len(text.encode()) for records in loaded for text in records.texts()) if max_bytes else 0
        if max_bytes is not None and loaded and used_bytes >= max_bytes:
            break
        loaded.append(_load_one(spec, None if max_bytes is None else max_bytes - used_bytes))
        if loaded[-1].kind != loaded[0].kind:
            raise InputError(
                f"data {loaded[0].source!r} holds {loaded[0].kind} but {spec!r} holds {loaded[-1].kind}:"
                " use data of one kind in a run."
            )
    items = [item for records in loaded for item in records.items]
    source = ", ".join(records.source for records in loaded)
    return Records(loaded[0].kind, items, source, all(records.turns for records in loaded))


def _load_one(spec: str, max_bytes: int | None) -> Records:
    if spec.partition(":")[0] == "stdlib":
        return dataclasses.replace(_gather(spec, stdlib_objects(spec), max_bytes), turns=spec == QUESTIONS)
    path = Path(spec).expanduser()
    try:
        if path.is_dir():
            raise InputError(f"data {spec!r} is a directory: give {ACCEPTED}.")
        if path.exists():
            return _file_records(spec, path, max_bytes)
    except OSError as error:
        raise InputError(f"data {spec!r} cannot be read ({error.strerror or error}): give {ACCEPTED}.") from error
    if HUB_ID.fullmatch(spec) and path.suffix.lower() not in DATA_SUFFIXES | OTHER_DATA_SUFFIXES:
        return _hub_records(spec, max_bytes)
    raise InputError(f"data {spec!r} does not exist: give {ACCEPTED}.")


def _file_records(spec: str, path: Path, max_bytes: int | None) -> Records:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        with path.open("rb") as lines:
            return _gather(spec, _jsonl_objects(spec, lines), max_bytes)
    if suffix == ".parquet":
        return _gather(spec, _parquet_objects(spec, path), max_bytes)
    if suffix == ".txt":
        text = _decode(path.read_bytes(), f"data {spec!r}")
        return _gather(spec, [(f"data {spec!r}", {"text": text})], max_bytes)
    raise InputError(f"data {spec!r} ends in {path.suffix or 'no suffix'!r}, which is not known: give {ACCEPTED}.")


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 at byte {error.start}: convert the file to UTF-8.") from error


def _jsonl_objects(spec: str, lines: Iterable[bytes]) -> Iterator[tuple[str, object]]:
    for number, raw in enumerate(lines, start=1):
        where = f"data {spec!r}, line {number}"
        line = _decode(raw, where)
        if line.strip():
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where} is not JSON ({error}): give one JSON object per line.") from error


def _parquet_objects(spec: str, path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        table = parquet.ParquetFile(path)
        wanted = [
            name for name in table.schema_arrow.names if name in {f for fields in FIELDS.values() for f in fields}
        ]
        if not wanted:
            found = ", ".join(map(repr, table.schema_arrow.names)) or "none"
            raise InputError(f"data {spec!r} has the columns {found}: {WANTED_FIELDS} wanted; rename its columns.")
        rows = (row for batch in table.iter_batches(columns=wanted) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"data {spec!r}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data {spec!r} cannot be read as parquet ({_first_line(error)}): write it again.") from error


def _hub_records(spec: str, max_bytes: int | None) -> Records:
    import datasets

    try:
        rows = datasets.load_dataset(spec, split="train")
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise InputError(
            f"data {spec!r} is no local file, and the Hugging Face hub could not be reached or has no such data set"
            f" ({_first_line(error)}): local .jsonl, .txt and .parquet files and stdlib work offline."
        ) from error
    return _gather(spec, ((f"data {spec!r}, row {n}", row) for n, row in enumerate(rows, start=1)), max_bytes)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _gather(source: str, objects: Iterable[tuple[str, object]], max_bytes: int | None) -> Records:
    """Check each (place, object) and collect them up to `max_bytes`."""
    kind, items, used_bytes = "", list[Any](), 0
    for where, found in objects:
        if not isinstance(found, dict):
            raise InputError(f"{where} is not an object but {_type_name(found)}: {WANTED_FIELDS} wanted.")
        own_kind = _kind_of(found)
        kind = kind or own_kind
        # A data set may carry columns of several kinds; what counts is that every row has those of the first row.
        if not kind or not all(name in found for name in FIELDS[kind]):
            if own_kind:
                raise InputError(f"{where} holds {own_kind} but the lines before hold {kind}: use one kind per file.")
            names = ", ".join(map(repr, found)) or "no fields"
            raise InputError(f"{where} has {names}: {WANTED_FIELDS} wanted.")
        item, size_bytes = CHECKS[kind](found, where)
        if max_bytes is not None and used_bytes + size_bytes > max_bytes:
            if kind == "text":
                item = item.encode()[: max_bytes - used_bytes].decode(errors="ignore")
            elif items:
                break
        if kind != "text" or item.strip():
            items.append(item)
        used_bytes += size_bytes
        if max_bytes is not None and used_bytes >= max_bytes:
            break
    if not items:
        raise InputError(f"data {source!r} is empty: at least one record that is not blank is wanted.")
    return Records(kind, items, source)


def _kind_of(found: dict[str, Any]) -> str:
    return next((kind for kind, fields in FIELDS.items() if all(name in found for name in fields)), "")


def _type_name(value: object) -> str:
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _checked_string(value: object, name: str, where: str) -> tuple[str, int]:
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} is {_type_name(value)}, a string is wanted.")
    try:
        return value, len(value.encode())
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {name} holds half a surrogate pair, which is no text: remove it.") from error


def _check_text(found: dict[str, Any], where: str) -> tuple[str, int]:
    return _checked_string(found["text"], "'text'", where)


def _check_prompt(found: dict[str, Any], where: str) -> tuple[dict[str, str], int]:
    checked = {name: _checked_string(found[name], repr(name), where) for name in FIELDS["prompt"]}
    return {name: text for name, (text, _) in checked.items()}, sum(size for _, size in checked.values())


def _check_messages(found: dict[str, Any], where: str) -> tuple[list[dict[str, Any]], int]:
    messages, size_bytes = found["messages"], 0
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        shape = "a list with something else in it" if isinstance(messages, list) else _type_name(messages)
        raise InputError(f"{where}: 'messages' is {shape}, a list of objects with 'role' and 'content' is wanted.")
    for index, message in enumerate(messages, start=1):
        for name in ("role", "content"):
            if name not in message:
                names = ", ".join(map(repr, message)) or "no fields"
                raise InputError(f"{where}: message {index} has {names}: 'role' and 'content' wanted.")
            size_bytes += _checked_string(message[name], f"{name!r} of message {index}", where)[1]
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{where}: no message has the role 'assistant', so there is nothing to learn: add its answer.")
    return messages, size_bytes


CHECKS: dict[str, Callable[[dict[str, Any], str], tuple[Any, int]]] = {
    "text": _check_text,
    "prompt": _check_prompt,
    "messages": _check_messages,
}
