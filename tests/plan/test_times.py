"""The time that `lisa-kernels plan` tells: of one machine, of every card that holds the run, of the whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lisa_kernels.cli import main
from lisa_kernels.plan.machines import CARDS, Seconds
from lisa_kernels.plan.times import span

from .small_config import write_config

KEYS = {"step_seconds_low", "step_seconds_high", "tokens_per_second_low", "tokens_per_second_high", "bound_by"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_config(tmp_path_factory.mktemp("model")))


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """Return what a plan says as JSON and as text."""
    shape = ["--method", "lisa", "--batch-size", "2", "--seq-len", "32"]
    assert main(["plan", *shape, *arguments, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert main(["plan", *shape, *arguments]) == 0
    return values, capsys.readouterr().out


def test_one_card_is_told_with_where_the_time_goes(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    values, text = told(capsys, "--model", config, "--card", "rtx-3090", "--steps", "500", "--gradient-checkpointing")
    assert values.keys() >= KEYS
    assert 0 < values["step_seconds_low"] < values["step_seconds_high"]
    assert values["tokens_per_second_high"] == pytest.approx(64 / values["step_seconds_low"])
    assert values["run_seconds_high"] == pytest.approx(500 * values["step_seconds_high"])
    assert "a step on rtx-3090" in text
    assert "no card has confirmed it" in text
    assert all(f"{part} " in text for part in ("forward", "recomputation", "backward", "optimizer", "bound by:"))


@pytest.mark.slow
def test_without_a_card_each_that_holds_the_run_has_a_line(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    values, text = told(capsys, "--model", config)
    assert [entry["machine"] for entry in values["times"]] == list(CARDS)
    assert all(f" {name} " in text for name in CARDS)
    # The default length, said.
    assert values["steps"] == 200
    assert "200 steps" in text
    values, _ = told(capsys, "--model", "preset:llama-2-7b", "--embeddings", "low-rank")
    assert "rtx-3060" not in [entry["machine"] for entry in values["times"]]


@pytest.mark.slow
def test_rates_describe_any_other_card(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = "preset:small"
    slow, _ = told(capsys, "--model", model, "--bandwidth", "100", "--tflops", "10")
    fast, _ = told(capsys, "--model", model, "--bandwidth", "1000", "--tflops", "100")
    assert fast["step_seconds_low"] < slow["step_seconds_low"]


@pytest.mark.slow
def test_passes_over_data_are_as_many_steps_as_the_run_takes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Rows are held out, and share a length where the run would have them share it; without data nothing is told."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}) + "\n" for n in range(40)))
    rows = ["--model", "preset:tiny", "--epochs", "2", "--batch-size", "2", "--seq-len", "32", "--method", "lisa"]
    asked = [*rows, "--data", str(data), "--eval-fraction", "0.25"]
    values, _ = told(capsys, *asked)
    assert main(["finetune", *asked, "--dtype", "fp32", "--output", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == values["steps"] > 1
    assert told(capsys, *asked, "--no-packing")[0]["steps"] == 30 > values["steps"]
    values, text = told(capsys, *rows, "--card", "l4")
    assert values["steps"] is None
    assert values["run_seconds_high"] is None
    assert "None" not in text


def test_this_machine_is_measured(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    values, text = told(capsys, "--model", config, "--card", "cpu", "--dtype", "fp32")
    assert values["machine"] == "this CPU"
    assert "measured just now" in text


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--card", "rtx-4900"], ["rtx-4090", "--bandwidth"]),
        (["--bandwidth", "100"], ["--tflops"]),
        (["--tflops", "0", "--bandwidth", "3"], ["--tflops is 0.0"]),
        (["--card", "CPU", "--tflops", "3"], ["--card cpu is measured"]),
    ],
)
def test_bad_input_is_one_sentence(
    flags: list[str], named: list[str], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", config, *flags]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in named), error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (Seconds(0.312, 0.394), "0.31-0.39 s"),
        (Seconds(1.4, 2.6), "1.4-2.6 s"),
        (Seconds(300.0, 480.0), "5.0-8.0 min"),
        (Seconds(19000.0, 27000.0), "5.3-7.5 h"),
        (Seconds(200000.0, 300000.0), "2.3-3.5 days"),
    ],
)
def test_ranges_are_said_in_one_unit(seconds: Seconds, text: str) -> None:
    assert span(seconds) == text
