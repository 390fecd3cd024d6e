"""What a run leaves of itself as it goes."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from small_run import arguments, summary, write_text

from lisa_kernels.cli import main
from lisa_kernels.methods import SampledAdamW
from lisa_kernels.report import read_lines, read_run
from lisa_kernels.train.history import RunHistory

pytestmark = pytest.mark.usefixtures("plans_once")

TIMED = ("seconds", "tokens_per_second", "peak_bytes")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A finished run of six steps with two answers, three periods and two evaluations."""
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main(_arguments(text, output)) == 0
    return output


def _arguments(text: Path, output: Path, *more: str) -> list[str]:
    given = ["--save-every", "2", "--eval-every", "3", "--samples", "2", "--calibration-rows", "2"]
    return arguments(text, output, *given, *more, method="owlore")


def _untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(
        ({key: value for key, value in line.items() if key not in TIMED} for line in lines),
        key=lambda line: json.dumps(line),
    )


def test_a_run_leaves_its_curves_draws_memory_and_answers(finished: Path) -> None:
    run = read_run(finished)
    values = summary(finished)
    assert [step for step, _ in run.curve("loss")] == [1, 2, 3, 4, 5, 6]
    assert (run.curve("loss")[0][1], run.curve("loss")[-1][1]) == (
        values["train_loss_first"],
        values["train_loss_last"],
    )
    assert [layers for _, _, layers in run.draws] == values["layer_history"][:3]
    assert [step for step, _ in run.held_out] == [0, 3, 6]
    assert all(value > 0 for key in ("grad_norm", "tokens_per_second") for _, value in run.curve(key))
    assert [(bool(answer["prompt"]), answer["before"] is None, answer["after"] is None) for answer in run.answers] == [
        (True, False, False), (True, False, False),
    ]  # fmt: skip


def test_what_was_planned_to_be_held_is_what_was_held(finished: Path) -> None:
    """Like with like: weights, gradients and bases to the byte, the state of no more layers than the plan's."""
    run = read_run(finished)
    planned = run.begin["plan"]["held_bytes"]
    held = run.logs[-1]["held_bytes"]
    assert {name: held[name] for name in ("weights", "gradients", "bases")} == {
        name: planned[name] for name in ("weights", "gradients", "bases")
    }
    assert 0 < held["optimizer state"] <= planned["optimizer state"]


def test_the_page_is_in_the_folder_and_says_what_the_command_says(finished: Path, tmp_path: Path) -> None:
    written = (finished / "report.html").read_bytes()
    assert b"It learnt: held-out loss fell by" in written
    assert main(["report", str(finished), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == written


def test_answers_change_nothing_of_the_run(finished: Path, text: Path, tmp_path: Path) -> None:
    """The weights are bit-equal with and without."""
    assert main(_arguments(text, tmp_path / "run", "--samples", "0")) == 0
    with_answers, without = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path / "run"))
    assert all(torch.equal(with_answers[name], without[name]) for name in with_answers)
    assert not read_run(tmp_path / "run").answers


@pytest.mark.slow
def test_a_resumed_run_has_the_history_of_one_that_never_stopped(
    finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in step 3, and with lines past the checkpoint as a kill would leave them."""
    output, real, count = tmp_path / "run", SampledAdamW.step, [0]

    def step(self: SampledAdamW, *args: Any, **kwargs: Any) -> Any:
        count[0] += not next(self.model.parameters()).is_meta
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SampledAdamW, "step", step)
        assert main(_arguments(text, output)) == 130
    assert read_run(output).steps == 3
    assert "not finished: step 3 of 6" in (output / "report.html").read_text()
    with (output / "history.jsonl").open("a") as file:
        file.write('{"kind": "log", "step": 4, "loss": 0.0}\n{"kind": "log", "st')
    assert main(_arguments(text, output, "--resume")) == 0
    resumed, whole = (read_lines(folder / "history.jsonl") for folder in (output, finished))
    assert _untimed(resumed) == _untimed(whole)
    seconds = [line["seconds"] for line in resumed if line["kind"] == "log"]
    assert seconds == sorted(seconds), "the time of the first part is counted on"


def test_a_broken_history_does_not_stop_a_resumed_run(tmp_path: Path) -> None:
    """It begins anew, and says so."""
    out = io.StringIO()
    (tmp_path / "history.jsonl").write_text("no line\nof a history\n")
    history = RunHistory(tmp_path, cast(Any, None), cast(Any, None), 1.0, Console(file=out, width=300))
    history.begin({"layers": ["a"]}, steps=4)
    assert "line 1, is no line of a run's history" in out.getvalue()
    assert read_lines(tmp_path / "history.jsonl") == [{"kind": "begin", "step": 0, "layers": ["a"]}]


def test_a_page_that_fails_costs_the_run_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither do answers, nor a history that cannot be written."""
    from lisa_kernels.train import finetune, history

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no room for ornaments")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finetune, "write_page", fails)
    monkeypatch.setattr(finetune, "answers", fails)
    monkeypatch.setattr(history.RunHistory, "_write_lines", full)
    output = tmp_path / "run"
    assert main(_arguments(text, output, "--samples", "1", "--save-every", "0", "--eval-every", "0")) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("no room for ornaments") == 3
    assert told.count("No space left on device") == 1
    assert (output / "model.safetensors").exists()
    assert summary(output)["steps"] == 6
    assert not (output / "report.html").exists()
