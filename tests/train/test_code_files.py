"""A run whose resting weights are in a file: the bits of any other, nothing beside it, and what it says."""

from __future__ import annotations

import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from forked import in_another_process
from rich.console import Console
from safetensors.torch import load_file
from small_run import arguments, summary, write_text
from torch import Tensor

from lisa_kernels.cli import main
from lisa_kernels.errors import InputError
from lisa_kernels.methods import SampledAdamW
from lisa_kernels.paging.page_file import PageFile
from lisa_kernels.train.finetune import finetune
from lisa_kernels.train.options import FineTuneOptions

pytestmark = pytest.mark.usefixtures("plans_once")
SETTINGS = ["--resting", "nf4", "--dtype", "bf16", "--active-layers", "1", "--save-every", "2"]


def command(data: Path, output: Path, *more: str) -> list[str]:
    return arguments(data, output, *SETTINGS, *more, method="owlore")


def same(one: Path, other: Path) -> bool:
    found = [load_file(folder / "model.safetensors") for folder in (one, other)]
    return all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_from_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's own, which holds what a run without has; with masters in files beside, and to the same end."""
    data, whole, killed = write_text(tmp_path), tmp_path / "whole", tmp_path / "killed"
    assert main(command(data, whole, "--resting-where", "host")) == 0
    assert summary(whole)["code_bytes_written"] == summary(whole)["code_bytes_read"] == 0
    killed.mkdir()
    here = ["--resting-where", str(killed), "--masters", str(tmp_path / "masters")]

    def be_killed() -> None:
        calls, take_step = [], SampledAdamW._take_step

        def step(optimizer: SampledAdamW) -> None:
            calls.append(optimizer)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            take_step(optimizer)

        SampledAdamW._take_step = step  # type: ignore[method-assign]
        main(command(data, killed, *here))

    assert in_another_process(be_killed) == -signal.SIGKILL
    capsys.readouterr()
    assert main(command(data, killed, *here, "--resume")) == 0
    said = capsys.readouterr().err
    assert same(whole, killed)
    found = summary(killed)
    assert found["code_bytes_read"] > found["code_bytes_written"] > 0
    assert "codes: " in said
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
def test_a_disk_that_codes_have_filled_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is no more room for what the run will save."""
    usage, written, write = namedtuple("usage", "total used free"), list[int](), PageFile._write

    def note(file: PageFile, begin: int, content: Tensor) -> None:
        write(file, begin, content)
        written.append(begin)

    monkeypatch.setattr(PageFile, "_write", note)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000 if written else 1 << 40))
    assert main(command(write_text(tmp_path), tmp_path / "run", "--resting-where", str(tmp_path))) == 2
    assert "has 0.00 GB left, and this run writes a model of" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_there_is_told_before_anything_is_read(tmp_path: Path) -> None:
    options = FineTuneOptions(
        model="preset:nothing", data="", output=tmp_path / "run", resting="nf4", resting_where=str(tmp_path / "none")
    )
    with pytest.raises(InputError, match="names a folder that is not there"):
        finetune(options, Console(quiet=True))
    assert not any(tmp_path.iterdir())
