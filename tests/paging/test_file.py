"""Pages in files: whole or not there, of this run or refused, and what a full, read-only or vanished folder does."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_kernels.errors import InputError
from lisa_kernels.paging import file
from lisa_kernels.paging.file import HEADER_BYTES, FilePage, FileStore, check_page_file, page_digest

CPU = torch.device("cpu")
N = 3000


def written(store: FileStore, value: int, name: str = "page") -> FilePage:
    page = store.page(name, N, CPU)
    page.take().fill_(value)
    page.give_back()
    return page


def left_behind(folder: Path, identity: dict[str, Any] | None = None) -> Path:
    """Return a page whose process was killed."""
    store = FileStore(str(folder), identity or {"seed": 1})
    path = written(store, 7).path
    store._lock.close()
    return path


def test_a_page_file_is_a_header_and_the_slab(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path), {"seed": 1})
    page = written(store, 7)
    assert page.path.read_bytes()[HEADER_BYTES:] == bytes([7]) * N
    assert check_page_file(page.path, store.digest("page")) == page._checksum


def test_closing_deletes_pages_and_the_folder_that_was_made(tmp_path: Path) -> None:
    made = FileStore(str(tmp_path / "a" / "b"), {})
    written(made, 1)
    made.close()
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "note.txt").write_text("mine")
    found = FileStore(str(tmp_path), {})
    written(found, 1)
    found.close()
    assert {path.name for path in tmp_path.iterdir()} == {"note.txt", "a"}


def cut(path: Path) -> None:
    os.truncate(path, HEADER_BYTES + N - 1)


def cut_in_the_header(path: Path) -> None:
    os.truncate(path, 20)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + 5] ^= 1
    path.write_bytes(content)


def age(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8] = 99
    path.write_bytes(content)


def replace_by_text(path: Path) -> None:
    path.write_text("x" * (HEADER_BYTES + N))


def replace_by_another_runs(path: Path) -> None:
    other = left_behind(path.parent.with_name("other"), {"seed": 2})
    shutil.copy(other, path)


Spoil = Callable[[Path], None]
SPOILT: list[tuple[Spoil, str]] = [
    (cut, "is cut short"), (cut_in_the_header, "not a page"), (age, "format 99"), (replace_by_text, "not a page"),
    (replace_by_another_runs, "of another run"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "words"), [*SPOILT, (flip_a_bit, "checksum is wrong")], ids=lambda v: getattr(v, "__name__", "")
)
def test_a_page_that_was_changed_is_refused_when_it_is_taken(tmp_path: Path, spoil: Spoil, words: str) -> None:
    page = written(FileStore(str(tmp_path / "pages"), {"seed": 1}), 7)
    spoil(page.path)
    with pytest.raises(InputError, match=words):
        page.take()


@pytest.mark.parametrize(("spoil", "words"), SPOILT, ids=lambda v: getattr(v, "__name__", ""))
def test_a_folder_with_such_a_page_is_refused_and_left_as_it_is(tmp_path: Path, spoil: Spoil, words: str) -> None:
    path = left_behind(tmp_path / "pages")
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=words):
        FileStore(str(tmp_path / "pages"), {"seed": 1})
    assert path.read_bytes() == before


def test_what_a_killed_process_of_the_same_run_left_makes_room(tmp_path: Path) -> None:
    left_behind(tmp_path)
    (tmp_path / "page.page.partial").write_text("half")
    store = FileStore(str(tmp_path), {"seed": 1})
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert not store.page("page", N, CPU).take().any()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no advisory locks")
def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path), {})
    with pytest.raises(InputError, match="in use by another"):
        FileStore(str(tmp_path), {})
    store.close()
    FileStore(str(tmp_path), {})


@pytest.mark.parametrize("what", ["a file", "below a file", "read-only"])
def test_a_folder_that_cannot_hold_pages_is_refused_at_the_start(tmp_path: Path, what: str) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    folder = plain if what == "a file" else plain / "pages"
    if what == "read-only":
        folder = tmp_path / "sealed"
        folder.mkdir(mode=0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write anywhere")
    with pytest.raises(InputError, match=r"cannot hold pages \((Not a directory|File exists|Permission denied)\)"):
        FileStore(str(folder), {})


class FullDisk:
    """A file that takes some bytes and then no more."""

    def __init__(self, path: Path, room: int) -> None:
        self.file, self.room = open(path, "wb"), room  # noqa: SIM115

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> None:
        size = memoryview(content).nbytes
        self.file.write(bytes(content)[: self.room])
        self.room -= size
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("room", [0, HEADER_BYTES, HEADER_BYTES + N - 1])
def test_a_full_disk_stops_the_write_and_keeps_the_last_page(
    tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page before is whole, on the disk and for this process, and the slab is still on the device."""
    page = written(FileStore(str(tmp_path), {}), 7)
    before = page.path.read_bytes()
    page.take().fill_(8)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: FullDisk(path, room))
        with pytest.raises(InputError, match=r"No space left on device.*pages written before are whole"):
            page.give_back()
    assert page.path.read_bytes() == before
    assert (page.home() == 7).all()
    assert (page.take() == 8).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "page.page"]
    page.give_back()
    assert (page.home() == 8).all()


def test_a_folder_removed_during_the_run_stops_the_next_write(tmp_path: Path) -> None:
    """What was written is still read: a map outlives its file's name."""
    page = written(FileStore(str(tmp_path / "pages"), {}), 7)
    shutil.rmtree(tmp_path / "pages")
    page.settle()
    assert (page.home() == 7).all()
    page.take().fill_(8)
    with pytest.raises(InputError, match=r"No such file or directory.*resume from the last checkpoint"):
        page.give_back()
    assert (page.home() == 7).all()
    assert (page.take() == 8).all()


KILLED = """
import os, sys, torch
from lisa_kernels.paging import file
store = file.FileStore(sys.argv[1], {"seed": 1})
page = store.page("page", 3000, torch.device("cpu"))
page.take().fill_(7)
page.give_back()
def die(*_):
    os._exit(9)
setattr(*((os, "fsync") if sys.argv[2] == "before the flush" else (file.Path, "replace")), die)
page.take().fill_(8)
page.give_back()
"""


@pytest.mark.parametrize("when", ["before the flush", "before the rename"])
def test_a_kill_during_a_write_leaves_the_page_before(tmp_path: Path, when: str) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when], capture_output=True)
    assert killed.returncode == 9, killed.stderr.decode()
    check_page_file(tmp_path / "page.page", page_digest({"seed": 1}, "page"))
    assert (tmp_path / "page.page").read_bytes()[HEADER_BYTES:] == bytes([7]) * N
    assert (tmp_path / "page.page.partial").exists()


def test_a_write_in_place_would_not_survive_the_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without writing aside, a full disk spoils the page before."""
    page = written(FileStore(str(tmp_path), {}), 7)
    page.take().fill_(8)
    monkeypatch.setattr(file, "PARTIAL", file.SUFFIX)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: FullDisk(path, HEADER_BYTES + 10))
        with pytest.raises(InputError, match="No space left"):
            page.give_back()
    assert not page.path.exists()
