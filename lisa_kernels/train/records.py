"""Read what `--data` names into records: plain texts, prompts with completions, instructions, or conversations."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lisa_kernels.errors import InputError
from lisa_kernels.train.sources.files import (
    ACCEPTED,
    DATA_SUFFIXES,
    OTHER_DATA_SUFFIXES,
    Place,
    file_rows,
    folder_files,
    hub_rows,
)
from lisa_kernels.train.sources.kinds import FIELDS, KNOWN, WANTED, checked_item, fields_of, named, other_fields_of
from lisa_kernels.train.sources.messages import type_name
from lisa_kernels.train.sources.stdlib import stdlib_objects

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Kinds whose items are conversations.
SPOKEN = {"messages", "instruction"}


@dataclass(frozen=True)
class Records:
    """The documents or examples of one or several data sources, all of one kind.

    kind: "text" (items: str), "prompt" (items: dict with str prompt and completion), "messages" (items: list of dict
    with str role and content, at least one from the assistant, or dict of such `messages` and their `tools`) or
    "instruction" (items as of messages: what `for_template` makes conversations or prompts of).
    notes: what a reader of the data should be told, such as rows that were left out. rows: of each item (its place in
    words, the row as it was read with all its columns), where `load_records` was asked to keep them.
    """

    kind: str
    items: list[Any]
    source: str
    notes: list[str] = field(default_factory=list, compare=False)
    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list, compare=False)

    def __len__(self) -> int:
        return len(self.items)

    def digest(self) -> str:
        """Return a checksum of the items and their order: SHA-256 as 64 hexadecimal digits."""
        checksum = hashlib.sha256(self.kind.encode())
        for item in self.items:
            checksum.update(json.dumps(item, sort_keys=True, default=str).encode() + b"\n")
        return checksum.hexdigest()

    def for_template(self, template: Any) -> Records:
        """Return the records as a tokenizer with this chat template reads them; None: it has no template.

        Instructions become conversations, without a template prompts: their parts with blank lines between.
        """
        if self.kind != "instruction":
            return self
        if template:
            note = "instructions and answers are written as conversations in the tokenizer's chat template"
            return dataclasses.replace(self, kind="messages", notes=[*self.notes, note])
        note = "the tokenizer has no chat template: instructions and answers are plain text with a blank line between"
        items = [as_prompt(item) for item in self.items]
        return dataclasses.replace(self, kind="prompt", items=items, notes=[*self.notes, note])

    def texts(self) -> list[str]:
        """Return the text of each item, for training a tokenizer."""
        if self.kind == "text":
            return list(self.items)
        if self.kind == "prompt":
            return [item["prompt"] + item["completion"] for item in self.items]
        return ["\n".join(message["content"] for message in messages_of(item)) for item in self.items]


def messages_of(item: Any) -> list[dict[str, Any]]:
    """Return the messages of a conversation, which may have tools beside them."""
    return list(item["messages"] if isinstance(item, dict) else item)


def as_prompt(item: Any) -> dict[str, str]:
    """Return a conversation that ends in an answer as one prompt and its completion, without roles."""
    *before, answer = (message["content"].strip() for message in messages_of(item))
    return {"prompt": "".join(f"{part}\n\n" for part in before), "completion": answer}


def load_records(
    specs: str | Sequence[str],
    *,
    max_bytes: int | None = None,
    columns: Mapping[str, str] | None = None,
    keep_rows: bool = False,
) -> Records:
    """Load the records that one or several `specs` name, in their own order.

    max_bytes: stop after this many bytes of UTF-8 text; the last text is cut, other examples are kept or left whole.
    columns: for each field of a row (prompt, completion, messages, ...) the column that holds it; see `FIELDS`.
    keep_rows: keep in `Records.rows` what the columns beside these hold.
    Raises InputError for anything that cannot be read as records, and for sources of different kinds.
    """
    if max_bytes is not None and max_bytes < 1:
        raise InputError(f"max_bytes is {max_bytes}: give at least 1, or nothing for all of the data.")
    loaded, used_bytes = list[Records](), 0
    for spec in [specs] if isinstance(specs, str) else specs:
        if max_bytes is not None and used_bytes >= max_bytes:
            break
        records = _load_one(spec, None if max_bytes is None else max_bytes - used_bytes, columns)
        used_bytes += sum(map(_size_bytes, records.items)) if max_bytes is not None else 0
        loaded.append(records if keep_rows else dataclasses.replace(records, rows=[]))
    return _joined(loaded)


def _joined(loaded: Sequence[Records]) -> Records:
    kinds = {records.kind for records in loaded}
    if len(kinds) > 1 and not kinds <= SPOKEN:
        other = next(records for records in loaded if records.kind != loaded[0].kind)
        raise InputError(
            f"data {loaded[0].source!r} holds {loaded[0].kind} but {other.source!r} holds {other.kind}:"
            " use data of one kind in a run."
        )
    return Records(
        kinds.pop() if len(kinds) == 1 else "messages",
        [item for records in loaded for item in records.items],
        ", ".join(records.source for records in loaded),
        list(dict.fromkeys(note for records in loaded for note in records.notes)),
        [row for records in loaded for row in records.rows],
    )


def _load_one(spec: str, max_bytes: int | None, columns: Mapping[str, str] | None) -> Records:
    if spec.partition(":")[0] == "stdlib":
        return _gather(spec, stdlib_objects(spec), max_bytes)
    path = Path(spec).expanduser()
    wanted = frozenset(columns.values()) if columns else KNOWN
    try:
        if path.is_dir():
            return _folder_records(spec, path, max_bytes, columns)
        if path.exists():
            return _gather(spec, file_rows(spec, path, wanted), max_bytes, columns)
    except OSError as error:
        raise InputError(f"data {spec!r} cannot be read ({error.strerror or error}): give {ACCEPTED}.") from error
    if HUB_ID.fullmatch(spec) and path.suffix.lower() not in {*DATA_SUFFIXES, *OTHER_DATA_SUFFIXES}:
        return _gather(spec, hub_rows(spec), max_bytes, columns)
    raise InputError(f"data {spec!r} does not exist: give {ACCEPTED}.")


def _folder_records(
    spec: str, folder: Path, max_bytes: int | None, columns: Mapping[str, str] | None
) -> Records:  # fmt: skip
    files, held_back = folder_files(spec, folder)
    records = load_records([str(path) for path in files], max_bytes=max_bytes, columns=columns, keep_rows=True)
    note = f"data {spec!r}: read {', '.join(str(path.relative_to(folder)) for path in files[:8])}"
    note += f" and {len(files) - 8} more" if len(files) > 8 else ""
    if held_back:
        names = ", ".join(str(path.relative_to(folder)) for path in held_back[:4])
        note += f"; left out as held back by their names: {names} (name a file itself to read it)"
    return dataclasses.replace(records, source=spec, notes=[note, *records.notes])


def _gather(
    source: str, rows: Iterable[Place], max_bytes: int | None, columns: Mapping[str, str] | None = None
) -> Records:
    """Check each (place, row) and collect the items up to `max_bytes`."""
    fields: tuple[str, ...] = ()
    items, notes, kept = list[Any](), list[str](), list[tuple[str, dict[str, Any]]]()
    used_bytes, rows_read, unanswered = 0, 0, 0
    for where, found in rows:
        if not isinstance(found, dict):
            raise InputError(f"{where} is not an object but {type_name(found)}: {WANTED}.")
        row = named(found, columns, where) if columns else found
        if not fields:
            fields = _fields_of_first(source, row, where, notes)
        elif not all(name in row for name in fields):
            _refuse_row(row, fields, where)
        kind = FIELDS[fields]
        item = checked_item(kind, fields, row, where)
        rows_read += 1
        if item is None:
            unanswered += 1
            continue
        size_bytes = _size_bytes(item)
        if max_bytes is not None and used_bytes + size_bytes > max_bytes:
            if kind == "text":
                item = item.encode()[: max_bytes - used_bytes].decode(errors="ignore")
            elif items:
                break
        if kind != "text" or item.strip():
            items.append(item)
            kept.append((where, found))
        used_bytes += size_bytes
        if max_bytes is not None and used_bytes >= max_bytes:
            break
    if unanswered:
        notes.append(f"data {source!r}: {unanswered} of {rows_read} rows are left out: their answer is empty")
    if not items:
        wanted = "with an answer" if unanswered else "that is not blank"
        raise InputError(f"data {source!r} is empty: at least one record {wanted} is wanted.")
    kind = "messages" if FIELDS[fields] == "prompt" and not isinstance(items[0], dict) else FIELDS[fields]
    if kind == "prompt" and any(not isinstance(item, dict) or "prompt" not in item for item in items):
        raise InputError(f"data {source!r} has prompts that are text and others that are messages: use one kind.")
    return Records(kind, items, source, notes, kept)


def _fields_of_first(source: str, row: dict[str, Any], where: str, notes: list[str]) -> tuple[str, ...]:
    """Return the columns that rows like this one are read by; another kind that it could be is told of."""
    fields = fields_of(row)
    if fields is None:
        raise InputError(f"{where} has {', '.join(map(repr, row)) or 'no columns'}: {WANTED}.")
    if others := other_fields_of(row, fields):
        notes.append(
            f"data {source!r}: rows are read by {' and '.join(map(repr, fields))};"
            f" {' and '.join(map(repr, others[0]))} are there too (choose with --columns)"
        )
    return fields


def _refuse_row(row: dict[str, Any], fields: tuple[str, ...], where: str) -> None:
    own = fields_of(row)
    if own is not None:
        raise InputError(
            f"{where} holds {' and '.join(own)} but the rows before hold {' and '.join(fields)}: use one kind per file."
        )
    raise InputError(f"{where} has {', '.join(map(repr, row)) or 'no columns'}: {WANTED}.")


def _size_bytes(item: Any) -> int:
    """Return the bytes of an item's texts in UTF-8."""
    if isinstance(item, str):
        return len(item.encode(errors="surrogatepass"))
    inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return sum(map(_size_bytes, inner))
