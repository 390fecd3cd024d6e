"""Pages that are at home in a file: what is read is what was last written, and whatever ends, nothing is left."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import platform
import random
import signal
import threading
import time
from collections import deque, namedtuple
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import in_another_process

from lisa_kernels.errors import InputError
from lisa_kernels.paging import page_file
from lisa_kernels.paging.page_file import PageFile
from lisa_kernels.paging.streamed import StreamedPage, StreamedPages

from .late_device import LateLanes
from .test_streamed import Reader, is_right, layout, seeds

CPU, META = torch.device("cpu"), torch.device("meta")
# Who must wait, and for whom: a copy for the last reader of its buffer, a reader for its copy, the disk for the copy of
# what it reads over, the host for what it is to write.
ORDERINGS = {
    "copies-wait-for-work": ("in", "work"),
    "work-waits-for-copies": ("work", "in"),
    "reading-waits-for-copies": ("host", "in"),
    "writing-waits-for-work": ("host", "work"),
}


class LateThread:
    """Does what it is asked when somebody waits for that, or for something later."""

    def __init__(self) -> None:
        self.asked: deque[LateFuture] = deque()

    def submit(self, work: Callable[..., None], /, *given: object) -> Future[None]:
        self.asked.append(LateFuture(self, lambda: work(*given)))
        return self.asked[-1]

    def shutdown(self) -> None:
        while self.asked:
            self.asked.popleft().do()


class LateFuture(Future[None]):
    """What tells the end."""

    def __init__(self, thread: LateThread, work: Callable[[], None]) -> None:
        super().__init__()
        self._thread, self.do = thread, work

    def result(self, timeout: float | None = None) -> None:
        while self in self._thread.asked:
            self._thread.asked.popleft().do()


def made(folder: Path, count: int = 4) -> tuple[StreamedPages, list[StreamedPage]]:
    """Return pages on the CPU, each full of its number."""
    pages = StreamedPages(file=PageFile(str(folder)))
    held = [pages.page(layout(1024), CPU) for _ in range(count)]
    for number, page in enumerate(held):
        page.write("codes", 0, torch.full((1024,), number, dtype=torch.uint8))
    return pages, held


def value(page: StreamedPage) -> int:
    with page.lent(CPU) as parts:
        [found] = parts["codes"].unique().tolist()
    return int(found)


def test_what_is_read_is_what_was_written_last(tmp_path: Path) -> None:
    """On devices that run late or at random, with a disk that does."""
    for seed in seeds():
        for thread in (None, LateThread()):
            lanes = LateLanes(seed if thread else None)
            assert is_right(lanes, random.Random(seed), PageFile(str(tmp_path), thread or AtOnce()))


class AtOnce:
    """A thread that is always faster than its caller."""

    def submit(self, work: Callable[..., None], /, *given: object) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(work(*given))
        return done

    def shutdown(self) -> None:
        pass


@pytest.mark.parametrize("name", ORDERINGS)
def test_every_ordering_is_needed(name: str, tmp_path: Path) -> None:
    """Negative control: with one of the waits left out, some of the same runs are wrong."""
    forgotten = {ORDERINGS[name]}
    assert not all(
        is_right(LateLanes(seed, forgotten), random.Random(seed), PageFile(str(tmp_path), thread))
        for seed in seeds()
        for thread in (AtOnce(), LateThread())
    )


def test_the_host_holds_two_buffers_and_the_disk_all_pages(tmp_path: Path) -> None:
    """Of a device with memory of its own; where that is the host's there is nothing else."""
    lanes = LateLanes()
    reader = Reader(lanes, PageFile(str(tmp_path)))
    largest = max(reader.pages.page_bytes())
    reader.read(0)
    assert [buffer.numel() for buffer in reader.pages.homes()] == [largest] * 2
    assert len(lanes.locked) == 2
    reader.pages.close()
    lanes.run_all()
    gc.collect()
    assert not lanes.locked
    pages, held = made(tmp_path)
    assert [value(page) for page in held] == [0, 1, 2, 3]
    assert pages.homes() == []
    assert pages.nbytes == pages.file.nbytes == 4 * layout(1024).nbytes


def test_what_is_written_and_read_is_counted(tmp_path: Path) -> None:
    pages, held = made(tmp_path)
    assert (pages.file.bytes_written, pages.file.bytes_read) == (4 * 1024, 0)
    for page in held:
        value(page)
    pages.close()
    assert pages.file.bytes_read == pages.nbytes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of other C libraries nothing is known")
def test_what_codes_were_made_in_goes_back_to_the_system(tmp_path: Path) -> None:
    """A small piece that stays beside each of them would keep a hole as large as they in the C library's heap."""
    file, stays, size = PageFile(str(tmp_path)), [], 16 << 20
    begin = file.place(8 * size)
    before = anonymous_bytes()
    for number in range(8):
        content = torch.ones(size, dtype=torch.uint8)
        file.write(begin + number * size, content)
        del content
        stays.append(torch.ones(1 << 17, dtype=torch.uint8))
    assert anonymous_bytes() - before < 3 * size + len(stays) * stays[0].numel()
    file.close()


def anonymous_bytes() -> int:
    """Return what this process holds that is in no file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_the_next_page_is_read_while_one_is_worked_on(tmp_path: Path) -> None:
    """By another thread: a disk that does not answer holds up nobody who has a page."""
    pages, held = made(tmp_path)
    assert [value(held[0]), value(held[1])] == [0, 1]
    answer, disk = threading.Event(), Disk(pages.file)
    disk.before_reading = lambda: answer.wait(10)
    with held[2].lent(CPU) as parts:
        # The page after this one is waited for by the disk only.
        assert parts["codes"].unique().tolist() == [2]
        start = time.monotonic()
        while not disk.asked and time.monotonic() < start + 10:
            time.sleep(0.001)
        assert (disk.asked, disk.answered) == (1, 0)
    answer.set()
    assert value(held[3]) == 3
    # A part at a time.
    assert disk.answered == 3
    pages.close()


def come_to_rest(file: PageFile) -> None:
    """Wait for what was read ahead."""
    file._thread.submit(lambda: None).result()


class Disk:
    """Stands between a file and its reader."""

    def __init__(self, file: PageFile) -> None:
        come_to_rest(file)
        self._file: Any = file._file
        self.asked = self.answered = 0
        self.before_reading: Callable[[], object] = lambda: None
        self.before_writing: Callable[[], object] = lambda: None
        file._file = self  # type: ignore[assignment]

    def seek(self, begin: int) -> None:
        self._file.seek(begin)

    def readinto(self, into: Any) -> int:
        self.asked += 1
        self.before_reading()
        self.answered += 1
        # As a disk may: a part of what is wanted.
        return int(self._file.readinto(into[:700]))

    def write(self, content: Any) -> int:
        self.before_writing()
        return int(self._file.write(content[:700]))

    def close(self) -> None:
        self._file.close()


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_disk_that_fails_is_one_sentence(tmp_path: Path) -> None:
    """Where its page is asked for; one that answers again is read again, and pages on other places as ever."""
    pages, held = made(tmp_path)
    disk = Disk(pages.file)
    assert value(held[0]) == 0
    come_to_rest(pages.file)
    disk.before_reading = fail
    assert value(held[1]) == 1
    for _ in range(2):
        with pytest.raises(InputError, match=r"cannot be read from a file in .* \(Input/output error\); their masters"):
            value(held[2])
    disk.before_reading = lambda: None
    assert [value(page) for page in held] == [0, 1, 2, 3]
    disk.before_writing = fail
    with pytest.raises(InputError, match=r"cannot be written to a file in .* \(Input/output error\); their masters"):
        held[1].write("codes", 0, torch.zeros(1024, dtype=torch.uint8))
    pages.close()


def test_a_limit_of_the_system_is_one_sentence(tmp_path: Path) -> None:
    """A real one, on the size of files, in a process of its own."""
    import resource

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
        with pytest.raises(InputError, match=r"cannot hold codes of weights that rest \(File too large\)"):
            made(tmp_path)
        os._exit(0)

    assert in_another_process(run) == 0


@pytest.mark.parametrize("how", ["a file", "not there", "small", "others' own"])
def test_a_folder_that_cannot_hold_pages_is_refused(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, words = tmp_path / "some", f"names a folder that is {how}; give 'device', 'host', or a folder that is there"
    free = 1 << 40
    if how == "a file":
        folder.write_text("")
    elif how == "small":
        folder.mkdir()
        free = 5_000
        words = r"rest take 8,192 bytes on the disk, and .* has 5,000 left; name a folder on another disk, or make room"
    elif how == "others' own":
        # Where nobody may make a file, whoever runs this.
        folder, words = Path("/proc/self/task"), "cannot hold codes of weights that rest .*; name a folder that can be"
    usage, present = namedtuple("usage", "total used free"), sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(page_file.shutil, "disk_usage", lambda path: usage(0, 0, free))
    with pytest.raises(InputError, match=words):
        made(folder)
    assert sorted(tmp_path.rglob("*")) == present


def test_nothing_is_left_of_a_process_that_is_killed(tmp_path: Path) -> None:
    """Nor seen of one that lives; two have the same folder, and what others have there stays."""
    (tmp_path / "theirs").write_text("mine")
    pages, held = made(tmp_path)

    def be_killed() -> None:
        _, others = made(tmp_path, 5)
        others[0].write("codes", 0, torch.full((1024,), 7, dtype=torch.uint8))
        assert value(others[0]) == 7
        assert os.listdir(tmp_path) == ["theirs"]
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_another_process(be_killed) == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["theirs"]
    assert [value(page) for page in held] == [0, 1, 2, 3]
    pages.close()
    assert (tmp_path / "theirs").read_text() == "mine"


def test_copies_are_in_host_memory(tmp_path: Path) -> None:
    """deepcopy and a pickle are of the moment when they were made; they need no file and stay when it goes."""
    pages, held = made(tmp_path)
    copies = [copy.deepcopy(held), pickle.loads(pickle.dumps(held))]
    for page in held:
        page.write("codes", 0, torch.full((1024,), 9, dtype=torch.uint8))
    assert [value(page) for page in held] == [9] * 4
    pages.close()
    for each in copies:
        assert each[0]._pages.file is None
        each[1].write("codes", 0, torch.full((1024,), 7, dtype=torch.uint8))
        assert [value(page) for page in each] == [0, 7, 2, 3]


def test_a_plan_needs_no_folder(tmp_path: Path) -> None:
    """Pages without values are read and written, and no file is made."""
    pages = StreamedPages(file=PageFile(str(tmp_path / "nowhere")))
    held = [pages.page(layout(1024), META) for _ in range(3)]
    for page in held:
        page.write("codes", 0, torch.empty(1024, dtype=torch.uint8, device="meta"))
        with page.lent(META) as parts:
            assert parts["codes"].is_meta
    pages.hold()
    assert [buffer.numel() for buffer in pages.held()] == [layout(1024).nbytes] * 2
    pages.close()
