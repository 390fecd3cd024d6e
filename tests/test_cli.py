"""The command line: help with defaults and units, scores, info, and errors of one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lisa_kernels.cli import main


def _help(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--help"])
    assert stop.value.code == 0
    # A narrow terminal breaks lines behind hyphens too.
    return " ".join(capsys.readouterr().out.split()).replace("- ", "-")


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(command in _help(capsys) for command in ("finetune", "plan", "scores", "bench", "info"))
    for command in (["finetune"], ["plan"], ["scores"], ["bench", "optimizer"], ["info"]):
        assert "--json" in _help(capsys, *command)


def test_finetune_takes_every_promised_flag_and_says_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys, "finetune")
    flags = "model data method active-layers period rank embeddings scores lr steps epochs batch-size accumulate "
    flags += "seq-len dtype seed eval-fraction save-every resume report-to output json keep-logits"
    for flag in flags.split():
        assert f"--{flag}" in text
    assert "tokens per row (default: 512)" in text
    assert "(default: 0.05)" in text
    assert "(default: 0)" in text
    assert not any(shown in text for shown in ("None", "default: True", "default: False", "SUPPRESS"))


def test_plan_takes_the_flags_of_finetune_that_decide_memory_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys, "plan")
    flags = "model method active-layers rank embeddings batch-size accumulate seq-len dtype paging retired-state json "
    flags += "plot fit gradient-checkpointing no-gradient-checkpointing keep-logits max-grad-norm data epochs steps "
    flags += "card bandwidth tflops"
    for flag in flags.split():
        assert f"--{flag}" in text
    assert "(default: bf16)" in text
    assert "--lr" not in text
    assert "half the rank, down to 32; fewer active layers, down to 2; embedding and head low-rank" in text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("layers take turns and the others rest. " * 400)
    return path


def test_scores_prints_json_and_draws_a_picture(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "scores.png"
    argv = ["scores", "--model", "preset:tiny", "--data", str(text), "--kind", "outlier", "--threshold", "3"]
    argv += ["--seq-len", "32", "--calibration-rows", "4", "--json", "--plot", str(plot)]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kind"] == "outlier"
    assert len(result["scores"]) == 8
    assert all(0 < score < 0.5 for score in result["scores"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_scores_shows_bars(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scores", "--model", "preset:tiny", "--kind", "weight-norm"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if "█" in line or "#" in line]) == 8


BAD = {
    "kind": (["--kind", "outliers"], "outlier"),
    "data wanted": (["--kind", "outlier"], "--data"),
    "plot suffix": (["--kind", "uniform", "--plot", "scores.xyz"], "scores.xyz"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_is_one_sentence_and_exit_code_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, named = BAD[case]
    assert main(["scores", "--model", "preset:tiny", *flags]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error


def test_info_names_the_kernel_of_every_operation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    operations = {row["op"] for row in info["kernels"] if row["device"] == "cpu"}
    assert {"adamw8_", "fold_", "quantize_blockwise", "lowrank_linear"} <= operations
    assert all(row["kernel"].startswith("C++") or row["kernel"] == "PyTorch" for row in info["kernels"])
    assert main(["info"]) == 0
    assert "adamw8_" in capsys.readouterr().out


def test_a_mistyped_command_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["finetun"])
    assert stop.value.code == 2
    assert "finetune" in capsys.readouterr().err
