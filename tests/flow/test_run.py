"""`lisa-kernels flow train` from options to a flow on disk, stopped and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lisa_kernels import InputError
from lisa_kernels.cli import main
from lisa_kernels.flow.average import AveragedGroups
from lisa_kernels.flow.options import FlowOptions
from lisa_kernels.flow.run import share_of_rate
from lisa_kernels.report import read_run

from .small_run import arguments, summary

TIMED = ("images_per_second", "peak_bytes_measured")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that was left alone."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(output, "--eval-every", "4")) == 0
    return output


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the process fail in the step after so many."""
    update, taken = AveragedGroups.update, [0]

    def failing(self: AveragedGroups, *given: Any) -> None:
        if taken[0] == steps:
            raise RuntimeError("the power is off")
        taken[0] += 1
        update(self, *given)

    monkeypatch.setattr(AveragedGroups, "update", failing)


def test_a_run_leaves_a_flow_its_figures_a_picture_and_a_page(whole: Path) -> None:
    values = summary(whole)
    assert values["steps"] == 8
    assert values["group_steps"] == [4, 4]
    assert values["eval_loss_after"] < values["eval_loss_before"]
    assert 0 < values["peak_bytes_planned"] < 10e6
    assert values["boundaries"] == [0.0, 0.5, 1.0]
    assert {"flow.json", "flow.safetensors", "samples.png", "report.html", "history.jsonl"} <= set(os.listdir(whole))
    run = read_run(whole)
    assert [step for step, _ in run.curve("loss")] == list(range(1, 9))
    assert [step for step, _ in run.held_out] == [0, 4, 8]


@pytest.mark.parametrize("more", [(), ("--resting-weights", "page", "--accumulate", "2")], ids=["kept", "paged"])
def test_a_run_that_stops_and_goes_on_changes_no_bit(
    more: tuple[str, ...], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its last checkpoint, with weights of resting groups kept or paged."""
    if more:
        whole = tmp_path / "whole"
        assert main(arguments(whole, *more)) == 0
    output = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(RuntimeError):
            main(arguments(output, "--save-every", "3", *more))
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-3"]
    assert main(arguments(output, "--save-every", "3", *more, "--resume")) == 0
    assert (output / "flow.safetensors").read_bytes() == (whole / "flow.safetensors").read_bytes()
    for name, value in summary(whole).items():
        if name not in TIMED:
            assert summary(output)[name] == value, name
    assert read_run(output).curve("loss") == read_run(whole).curve("loss")


def test_paged_weights_change_no_bit(whole: Path, tmp_path: Path) -> None:
    """Of the averages, which are what is saved, neither."""
    assert main(arguments(tmp_path / "paged", "--resting-weights", "page")) == 0
    assert (tmp_path / "paged" / "flow.safetensors").read_bytes() == (whole / "flow.safetensors").read_bytes()
    assert main(arguments(tmp_path / "other", "--seed", "1")) == 0
    assert (tmp_path / "other" / "flow.safetensors").read_bytes() != (whole / "flow.safetensors").read_bytes()


def test_ctrl_c_leaves_a_checkpoint_that_can_be_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update = AveragedGroups.update

    def interrupted(self: AveragedGroups, *given: Any) -> None:
        update(self, *given)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    monkeypatch.setattr(AveragedGroups, "update", interrupted)
    output = tmp_path / "run"
    assert main(arguments(output, "--json")) == 130
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    grid = tmp_path / "grid.png"
    assert main(["flow", "sample", "--model", str(output), "--count", "1", "--steps", "2", "--plot", str(grid)]) == 0
    assert grid.stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("times", "x_t = (1 - t) data + t noise", "says times"),
        ("routing", "interleaved", "says routing"),
        ("model", {}, "of another model"),
    ],
)
def test_a_checkpoint_of_another_convention_is_not_resumed(
    name: str, value: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one of an earlier version may be; its folder stays as it is."""
    output = tmp_path / "run"
    assert main(arguments(output, "--steps", "1", "--save-every", "1")) == 0
    file = output / "checkpoint-1" / "flow.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    capsys.readouterr()
    assert main(arguments(output, "--steps", "1", "--save-every", "1", "--resume")) == 2
    assert said in capsys.readouterr().err
    assert (output / "flow.safetensors").exists()


def test_a_resumed_run_must_be_the_same_run(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, said in (
        ((), "add --resume"),
        (("--resume", "--groups", "4"), "was run with --groups 2"),
        (("--resume", "--resting-weights", "page"), "was run with --resting-weights keep"),
        (("--resume", "--eval-fraction", "0.1"), "--eval-fraction 0.05"),
    ):
        assert main(arguments(whole, *more)) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--groups", "3"), "do not divide into 3 groups"),
        (("--patch", "3"), "patches of 3"),
        (("--boundaries", "0,0.7,0.6,1", "--groups", "3", "--layers", "3"), "rise from 0 to 1"),
        (("--boundaries", "0,x,1"), "--boundaries is '0,x,1'"),
        (("--retired-state", "drop"), "forgets a group's moments"),
        (("--data", "nowhere"), "is no folder that is there"),
        (("--times", "normal"), "logit-normal"),
        (("--steps", "0"), "--steps is 0"),
        (("--residual-attention", "behind"), "kind of residual attention"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_folder(
    more: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "run", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_rate_rises_and_falls() -> None:
    options = FlowOptions("digits", Path("run"), warmup_steps=10, steps=110)
    shares = [share_of_rate(options, step) for step in (0, 9, 10, 60, 109)]
    assert shares == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.000247], abs=1e-4)
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        FlowOptions("digits", Path("run"), lr_schedule="cosin")


@pytest.mark.slow
def test_kills_change_no_bit(tmp_path: Path) -> None:
    """SIGKILL at three random moments."""
    command = [sys.executable, "-m", "lisa_kernels.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    more = ["--steps", "60", "--save-every", "4"]
    subprocess.run([*command, *arguments(tmp_path / "whole", *more)], check=True, env=environment)
    draw, output = random.Random(0), tmp_path / "killed"
    for kill in range(3):
        resume = ["--resume"] if kill else []
        flags = [*command, *arguments(output, *more, *resume)]
        process = subprocess.Popen(flags, stderr=subprocess.PIPE, text=True, env=environment)
        assert process.stderr is not None
        lines = (line for line in process.stderr if line.startswith("step "))
        for _ in range(draw.randint(2, 12)):
            assert next(lines), "killed before its end"
        time.sleep(draw.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.stderr.close()
        process.wait()
    assert not (output / "summary.json").exists()
    subprocess.run([*command, *arguments(output, *more, "--resume")], check=True, env=environment)
    ends = [load_file(tmp_path / name / "flow.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert summary(output)["train_loss_last"] == summary(tmp_path / "whole")["train_loss_last"]


def test_pictures_of_ones_own_are_learnt_with_nothing_held_out(tmp_path: Path) -> None:
    """Coloured ones in two classes, with the last weights in place of the average."""
    from PIL import Image

    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / "pictures" / name / "one.png")
    more = ["--data", str(tmp_path / "pictures"), "--eval-fraction", "0", "--average", "0", "--steps", "2"]
    more += ["--samples", "0"]
    assert main(arguments(tmp_path / "run", *more)) == 0
    values = summary(tmp_path / "run")
    assert (values["eval_loss_before"], values["eval_loss_after"]) == (None, None)
    assert not (tmp_path / "run" / "samples.png").exists()
    said = json.loads((tmp_path / "run" / "flow.json").read_text())
    assert said["classes"]["names"] == ["blue", "red"]
    assert said["model"]["shape"]["channels"] == 3
