"""A run says what it took where nothing was given, trains by it, records it, and keeps it when it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_run import arguments, summary, write_text

from lisa_kernels.cli import _parser, main
from lisa_kernels.report import read_run
from lisa_kernels.train import defaults
from lisa_kernels.train.taken import short

pytestmark = pytest.mark.usefixtures("plans_once")

# preset:tiny: 8 layers of width 128, 2 active.
STEPS = 24
TAKEN = {"lr": defaults.rate("lisa", 128), "period": 3, "warmup_steps": 1}


def without(argv: list[str], *flags: str) -> list[str]:
    """Return the command line without these flags and their values."""
    places = {place + more for place, word in enumerate(argv) if word in flags for more in (0, 1)}
    return [word for place, word in enumerate(argv) if place not in places]


def automatic(data: Path, output: Path, *more: str) -> list[str]:
    """Return a command line that leaves rate, period and warm-up to the program."""
    return [*without(arguments(data, output), "--lr", "--period"), "--steps", str(STEPS), "--samples", "0", *more]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"))


def run_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return values


def test_what_is_told_is_what_it_trains_by_and_records(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(automatic(text, run, "--eval-fraction", "0")) == 0
    assert (
        f"took: learning rate {short(TAKEN['lr'])} for a width of 128, period 3 so that 8 layers are drawn 2 times on "
        "average in 24 steps, 1 step of warm-up\n"
    ) in capsys.readouterr().err
    told = summary(run)
    assert (told["lr"], told["settings"]["period"], told["warmup_steps"]) == tuple(TAKEN.values())
    assert told["given"] == dict.fromkeys(TAKEN)
    assert run_of(run)["taken"] == TAKEN
    assert TAKEN.items() <= read_run(run).settings.items()
    assert {name: run_of(run)["options"][name] for name in TAKEN} == dict.fromkeys(TAKEN)
    assert len(told["layer_history"]) == STEPS // 3 + 1
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in lines if line["kind"] == "log"}
    assert max(rates.values()) == TAKEN["lr"]
    # Of the schedule's first step the rate is 0: one step of warm-up.
    assert min(rates, key=lambda step: -rates[step]) == 2


def test_what_is_given_is_not_told(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--lr", "1e-3", "--period", "2", "--warmup-steps", "0", "--steps", "2"]
    assert main(automatic(text, tmp_path / "run", *more)) == 0
    assert "took:" not in capsys.readouterr().err
    assert run_of(tmp_path / "run")["taken"] == {"lr": 1e-3, "period": 2, "warmup_steps": 0}


def begin_again(folder: Path) -> None:
    """Take the end of a finished run away, so that it goes on from its first checkpoint."""
    for name in ("summary.json", "model.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / f"checkpoint-{STEPS}")


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_what_it_took(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the rules have changed since; and its record repeats it elsewhere, unless another length is given."""
    run, again = tmp_path / "run", tmp_path / "again"
    argv = automatic(text, run, "--save-every", "12", "--lr", "auto")
    assert main(argv) == 0
    whole = summary(run)
    begin_again(run)
    monkeypatch.setitem(defaults.RATES, "lisa", 1.0)
    monkeypatch.setattr(defaults, "VISITS", 4)
    monkeypatch.setattr(defaults, "STEPS_PER_WARMUP_STEP", 2)
    assert main([*argv, "--resume"]) == 0
    assert "as recorded" in capsys.readouterr().err
    assert main(["finetune", str(run), "--output", str(again)]) == 0
    same = ("lr", "warmup_steps", "given", "settings", "layer_history", "train_loss_last", "eval_loss_after")
    for folder in (run, again):
        assert {name: summary(folder)[name] for name in same} == {name: whole[name] for name in same}
    assert run_of(again)["options"] == run_of(run)["options"]
    # Another length has another period and warm-up, and the same rate.
    other = _parser().parse_args(["finetune", str(run), "--steps", "40"])
    assert (other.taken, other.period) == ({"lr": TAKEN["lr"]}, None)
    assert _parser().parse_args(["finetune", str(run), "--lr", "auto"]).taken.keys() == {"period", "warmup_steps"}


@pytest.mark.slow
def test_an_older_run_goes_on_as_it_began(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Before anything followed from the model, a run without a rate had one for 7B models, and no warm-up."""
    run = tmp_path / "run"
    old = {"lr": 5e-5, "period": 20, "warmup_steps": 0}
    flags = [word for name, value in old.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    argv = automatic(text, run, "--save-every", "12")
    assert main([*argv, *flags]) == 0
    whole = summary(run)
    record = run_of(run)
    del record["taken"]
    record["options"] |= {"lr": None, "period": None}
    (run / "run.json").write_text(json.dumps(record))
    assert _parser().parse_args(["finetune", str(run)]).taken == old
    begin_again(run)
    assert main([*argv, "--resume", "--warmup-steps", "2"]) == 2
    assert "--warmup-steps auto, which took 0" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    for name in ("lr", "settings", "layer_history", "train_loss_last", "eval_loss_after"):
        assert summary(run)[name] == whole[name]
