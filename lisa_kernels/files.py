"""Folders that are whole or not there: written aside, synced and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes `target` when the block ends well, and goes where it does not."""
    partial = target.with_name(f".{target.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    put_in_place(partial, target)


def put_in_place(partial: Path, target: Path) -> None:
    """Make a folder that is written `target`, in the place of what is there; each is whole at any moment."""
    for path in partial.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(partial)
    if target.exists():
        # A folder cannot be replaced in one move: the old one steps aside first.
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)
    else:
        partial.rename(target)
    _sync(target.parent)
