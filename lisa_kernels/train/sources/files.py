"""Rows from files, folders and the hub, each as (place, object): the place is what an error names."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lisa_kernels.errors import InputError
from lisa_kernels.train.sources.messages import type_name

ACCEPTED = (
    "a .jsonl, .json, .csv, .tsv, .txt or .parquet file, a folder of these, a Hugging Face data set id, or stdlib,"
    " stdlib:code, stdlib:docstrings, stdlib:questions"
)
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
OTHER_DATA_SUFFIXES = {".arrow", ".md", ".py", ".gz", ".zst", ".zip", ".tar", ".xz", ".npy", ".xlsx"}
# Names of what a data set holds back for testing.
HELD_BACK = ("test", "validation", "valid", "val", "dev", "eval", "heldout")
# Files that describe a data set and hold no rows.
DESCRIPTIONS = ("dataset_info", "dataset_infos", "dataset_dict", "state", "metadata", "readme", "license")
Place = tuple[str, object]


def file_rows(spec: str, path: Path, wanted: frozenset[str]) -> Iterable[Place]:
    """Return the rows of one file; `wanted` are the columns that are read where a file need not be read whole."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _jsonl_rows(spec, path)
    if suffix == ".json":
        return _json_rows(spec, path)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(spec, path, "\t" if suffix == ".tsv" else None)
    if suffix == ".parquet":
        return _parquet_rows(spec, path, wanted)
    if suffix == ".txt":
        return [(f"data {spec!r}", {"text": _decode(path.read_bytes(), f"data {spec!r}")})]
    raise InputError(f"data {spec!r} ends in {path.suffix or 'no suffix'!r}, which is not known: give {ACCEPTED}.")


def folder_files(spec: str, folder: Path) -> tuple[list[Path], list[Path]]:
    """Return (the files of rows in a folder and those below it, by name; the ones among them held back for testing).

    Where all files are of one sort, all are rows. Raises InputError for a folder without any.
    """
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        raise InputError(
            f"data {spec!r} is a folder that datasets' save_to_disk wrote: write it again with its to_parquet or"
            " to_json, and give that file."
        )
    relatives = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files = [
        path
        for path in relatives
        if path.suffix.lower() in DATA_SUFFIXES
        and not any(part.startswith(".") for part in path.parts)
        and path.stem.lower() not in DESCRIPTIONS
    ]
    if not files:
        raise InputError(f"data {spec!r} is a directory without rows: give {ACCEPTED}.")
    held_back = [path for path in files if any(_is_held_back(part) for part in (*path.parts[:-1], path.stem))]
    if len(held_back) == len(files):
        held_back = []
    return [folder / path for path in files if path not in held_back], [folder / path for path in held_back]


def _is_held_back(name: str) -> bool:
    words = re.split(r"[-_. ]", name.lower())
    return words[0] in HELD_BACK or words[-1] in HELD_BACK


def hub_rows(spec: str) -> Iterator[Place]:
    """Yield the rows of a hub data set's training part."""
    import datasets

    try:
        rows = datasets.load_dataset(spec, split="train")
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise InputError(
            f"data {spec!r} is no local file, and the Hugging Face hub could not be reached or has no such data set"
            f" ({_first_line(error)}): local files and stdlib work offline."
        ) from error
    return ((f"data {spec!r}, row {number}", row) for number, row in enumerate(rows, start=1))


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 at byte {error.start}: convert the file to UTF-8.") from error


def _jsonl_rows(spec: str, path: Path) -> Iterator[Place]:
    with path.open("rb") as lines:
        yield from _json_lines(spec, lines)


def _json_lines(spec: str, lines: Iterable[bytes]) -> Iterator[Place]:
    for number, raw in enumerate(lines, start=1):
        where = f"data {spec!r}, line {number}"
        line = _decode(raw, where)
        if line.strip():
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where} is not JSON ({error}): give one JSON object per line.") from error


def _json_rows(spec: str, path: Path) -> Iterator[Place]:
    """Yield the objects of a .json file: of its array, of the one array in its object, or one a line."""
    raw = path.read_bytes()
    text = _decode(raw, f"data {spec!r}")
    try:
        found: Any = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            yield from _json_lines(spec, raw.splitlines(keepends=True))
            return
        raise InputError(f"data {spec!r} is not JSON ({error}): give an array of objects, or one a line.") from error
    if isinstance(found, dict):
        arrays = [value for value in found.values() if isinstance(value, list)]
        found = arrays[0] if len(found) == len(arrays) == 1 and "messages" not in found else [found]
    if not isinstance(found, list):
        raise InputError(f"data {spec!r} is {type_name(found)}: an array of objects is wanted.")
    yield from ((f"data {spec!r}, row {number}", row) for number, row in enumerate(found, start=1))


def _csv_rows(spec: str, path: Path, delimiter: str | None) -> Iterator[Place]:
    """Yield the rows of a table whose first line names its columns; a .csv may be split by ; or tabs too."""
    text = _decode(path.read_bytes(), f"data {spec!r}")
    header = text.partition("\n")[0]
    if delimiter is None:
        delimiter = max(",;\t", key=header.count)
    limit = csv.field_size_limit(sys.maxsize)  # of the module, whose own would refuse long texts
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows = [(lines.line_num, row) for row in lines if row]
    except csv.Error as error:
        raise InputError(f"data {spec!r} is no table of values ({error}): write it again as CSV.") from error
    finally:
        csv.field_size_limit(limit)
    names = [name.strip() for name in rows[0][1]] if rows else []
    for number, row in rows[1:]:
        where = f"data {spec!r}, line {number}"
        if len(row) != len(names):
            raise InputError(
                f"{where} has {len(row)} values but the first line names {len(names)} columns: put quotes round texts"
                f" that hold {delimiter!r} or line breaks."
            )
        yield where, dict(zip(names, row))


def _parquet_rows(spec: str, path: Path, wanted: frozenset[str]) -> Iterator[Place]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        known = [name for name in names if name in wanted]
        read = known or names
        rows = (row for batch in table.iter_batches(columns=read) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"data {spec!r}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data {spec!r} cannot be read as parquet ({_first_line(error)}): write it again.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
