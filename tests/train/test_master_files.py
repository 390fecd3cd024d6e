"""A run whose masters are files: where they are, what it says of them, and how it ends where it cannot go on."""

from __future__ import annotations

import errno
import os
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from families import llama
from rich.console import Console
from small_run import arguments, summary, write_text

from lisa_kernels.cli import main
from lisa_kernels.errors import InputError
from lisa_kernels.methods import OwLore, SampledAdamW
from lisa_kernels.paging import masters as files
from lisa_kernels.paging import tensor_file
from lisa_kernels.report.record import read_run
from lisa_kernels.train import master_files
from lisa_kernels.train.empty_model import empty_model
from lisa_kernels.train.master_files import choose_masters, master_folder
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.placement import out_of_host_memory
from lisa_kernels.train.run_folder import MASTERS_FOLDER, RUN_FILE, open_run, start_run

pytestmark = pytest.mark.usefixtures("plans_once")
SETTINGS = ["--resting", "nf4", "--dtype", "bf16", "--active-layers", "1", "--save-every", "2"]


def command(data: Path, output: Path, *more: str) -> list[str]:
    return arguments(data, output, *SETTINGS, *more, method="owlore")


def options(output: Path, **settings: str | bool) -> FineTuneOptions:
    return FineTuneOptions(model="preset:tiny", data="", output=output, method="owlore", **settings)  # type: ignore[arg-type]


def test_masters_are_files_where_memory_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the run, unless another folder is named; which is said."""
    output, fp32 = tmp_path / "run", {"resting": "nf4", "dtype": "fp32"}
    matrices = sum(param.nbytes for param in empty_model("preset:tiny", "fp32").parameters() if param.dim() > 1)
    for free, wanted in ((2 * matrices, None), (2 * matrices - 1, str(output / "masters"))):
        monkeypatch.setattr(master_files, "available_bytes", lambda free=free: free)
        console = Console(width=1000)
        with console.capture() as said:
            assert choose_masters(options(output, **fp32), console).masters == wanted
        assert ("of memory are free: they are files in" in said.get()) == (wanted is not None)
    for given in (
        options(output, **fp32, masters="host"), options(output, **fp32, masters="x"), options(output, dtype="fp32"),
        options(output, resting="16-bit", dtype="fp32"),
    ):  # fmt: skip
        assert choose_masters(given, console) == given


def test_masters_want_room_on_their_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what the run saves there; nothing is wanted of a disk where they are in memory."""
    model, output, method = llama(), tmp_path / "run", OwLore(active_layers=1, rank=4)
    matrices = sum(param.nbytes for param in model.parameters() if param.dim() > 1)
    assert master_folder(options(output, resting="nf4", masters="host"), model, method) is None
    assert master_folder(options(output, resting="int8", masters="x"), model, method) == "x"
    assert master_folder(options(output), model, method) is None
    assert master_folder(options(output, resting="16-bit"), model, method) is None
    with pytest.raises(InputError, match="is for weights that rest in 8 or 4 bits"):
        options(output, masters="x")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(master_files.shutil, "disk_usage", lambda path: usage(0, 0, 2 * matrices))
    words = r"masters take up to [\d,]+ bytes on the disk, and the run saves [\d,]+ on the same one"
    with pytest.raises(InputError, match=words):
        master_folder(options(output, resting="nf4", masters=str(tmp_path / "x")), model, method)
    monkeypatch.setattr(master_files.shutil, "disk_usage", lambda path: usage(0, 0, 4 * matrices))
    master_folder(options(output, resting="nf4", masters=str(tmp_path / "x")), model, method)


def make_theirs(place: Path, what: str) -> None:
    """Put something of a user's where masters would be, or with "left" what a killed run leaves there."""
    place.parent.mkdir()
    if what == "file":
        place.write_text("mine")
    elif what == "link":
        (place.parent.parent / "album").mkdir()
        place.symlink_to(place.parent.parent / "album")
    else:
        place.mkdir()
        for name in {"folder": ["photo.raw"], "both": [files.LOCK, "photo.raw"], "empty": [], "left": [files.LOCK]}[
            what
        ]:
            (place / name).write_text("mine")


@pytest.mark.parametrize("what", ["file", "folder", "both", "empty", "link"])
def test_what_is_only_called_so_is_the_user_s(what: str, tmp_path: Path) -> None:
    """No run begins beside it, of text or of pictures, and one that goes on leaves it alone."""
    place = tmp_path / "run" / MASTERS_FOLDER
    make_theirs(place, what)
    with pytest.raises(InputError, match="holds files that are not a run of this program"):
        open_run(options(place.parent))
    (place.parent / RUN_FILE).write_text("{}")
    assert master_folder(options(place.parent), llama(), OwLore(active_layers=1, rank=4)) is None
    start_run(options(place.parent, resume=True), {})
    assert os.path.lexists(place)
    assert what not in ("folder", "both") or (place / "photo.raw").read_text() == "mine"


def test_what_a_killed_run_has_left_of_its_masters_goes(tmp_path: Path) -> None:
    place = tmp_path / "run" / MASTERS_FOLDER
    make_theirs(place, "left")
    assert open_run(options(place.parent)) == ({}, None)
    start_run(options(place.parent), {})
    assert not place.exists()


def test_the_host_s_memory_that_ends_is_told_in_one_sentence() -> None:
    """By torch's own error, Python's and the system's; no other is taken for one."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    told = str(out_of_host_memory(caught.value, resumable=True, resting="nf4"))
    assert told == (
        "the host has no more memory for 1,125,899,906,842,624 bytes; end other programs and continue from the last "
        "checkpoint with --resume, with --masters FOLDER, which keeps 16-bit weights in files."
    )
    for error in (MemoryError(), OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))):
        told = str(out_of_host_memory(error, resumable=False))
        assert told == "the host has no more memory; end other programs and start again."
    assert out_of_host_memory(RuntimeError("shapes do not fit"), resumable=True) is None
    assert out_of_host_memory(OSError(errno.ENOSPC, "full"), resumable=True) is None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "no memory"])
def test_a_run_that_stops_goes_on_to_the_same_end(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a disk that fills in a settling, and at memory that ends in a step; nothing of the masters is left."""
    data, whole, stopped = write_text(tmp_path), tmp_path / "whole", tmp_path / "stopped"
    assert main(command(data, whole)) == 0
    masters = str(stopped / "masters")

    def fsync(descriptor: int) -> None:
        if written := os.readlink(f"/proc/self/fd/{descriptor}"):
            count[0] += ".weight.2.master" in written
        if count[0] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    count, take_step = [0], SampledAdamW._take_step

    def step(optimizer: SampledAdamW) -> None:
        count[0] += 1
        if count[0] == 4:
            torch.empty(1 << 50, dtype=torch.uint8)
        take_step(optimizer)

    with monkeypatch.context() as patch:
        if how == "full":
            patch.setattr(tensor_file.os, "fsync", fsync)
        else:
            patch.setattr(SampledAdamW, "_take_step", step)
        capsys.readouterr()
        assert main(command(data, stopped, "--masters", masters)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert ("(No space left on device)" if how == "full" else "the host has no more memory") in said
    assert not (stopped / "summary.json").exists()
    assert main(command(data, stopped, "--masters", masters, "--resume")) == 0
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert summary(stopped)["master_bytes_written"] > summary(whole)["master_bytes_written"] == 0
    assert not (stopped / "masters").exists()
    assert "of masters" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_replaced_while_its_masters_are_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a killed one has left there goes, whatever the next one does."""
    data, output = write_text(tmp_path), tmp_path / "run"
    monkeypatch.setattr(master_files, "available_bytes", lambda: 1000)
    assert main(command(data, output)) == 0
    said = capsys.readouterr().err
    assert "masters: " in said
    assert not (output / "masters").exists()
    # The plan knew of it.
    run = read_run(output)
    planned = run.begin["plan"]["held_bytes"]["weights"]
    # A tensor that stands for a master has one number.
    assert 0 <= planned - max(each["held_bytes"]["weights"] for each in run.logs) < 200
    for more in ([], ["--masters", "host"]):
        (output / "masters").mkdir()
        (output / "masters" / files.LOCK).touch()
        (output / "masters" / f"x{files.SUFFIX}{tensor_file.PARTIAL}").write_bytes(b"half")
        assert main(command(data, output, "--overwrite", *more)) == 0
        assert not (output / "masters").exists()
