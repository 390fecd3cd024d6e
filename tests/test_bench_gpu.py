"""`make gpu`: what its file says first, where it stops, and that the file is there whatever happens."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import gpu
from bench.gpu import SMALL, Meaningless, Run, main, report
from bench.gpu_report import Report, head_of, read_report, rows_of, troubles
from lisa_kernels.devices import Machine
from lisa_kernels.trial import Trial

MACHINE: dict[str, Any] = {
    "kind": "machine", "python": "3.11.7", "cpu_threads": 8, "cuda": "13.0", "rocm": None, "driver": "580.65",
    "driver_cuda": "13.0", "visible_devices": None, "locked_memory_limit_bytes": None, "why_no_gpu": None,
    "packages": {"torch": "2.14.1+cu130", "triton": "3.8.0", "peft": None},
    "gpus": [{"name": "RTX 3090", "capability": "8.6", "total_bytes": 25_300_000_000, "free_bytes": 24_900_000_000,
              "auto_dtype": "bf16", "kernels": "all 7"}],
    "environment": {"commit": "abc1234", "date": "2026-11-29", "versions": {"torch": "2.14.1+cu130"}},
}  # fmt: skip
FINE: list[dict[str, Any]] = [
    MACHINE,
    {"kind": "stage", "name": "machine", "seconds": 1.0, "outcome": "done", "reason": ""},
    {"kind": "kernel", "op": "fold_", "seconds": 1.0, "problem": ""},
    {"kind": "method", "name": "lisa", "dtype": "bf16", "losses": [6.2, 6.0], "cpu_losses": [6.2, 6.01],
     "largest_difference": 0.002, "ms_per_step": 3.0, "problem": ""},
    {"kind": "memory", "name": "lisa", "model": "preset:tiny", "dtype": "bf16", "planned_bytes": 10**9,
     "measured_bytes": 1_001_000_000, "reserved_bytes": 2 * 10**9, "problem": ""},
    {"kind": "tests", "path": "tests/ops", "passed": 400, "failed": 0, "skipped": 1, "seconds": 200.0, "failures": []},
    {"kind": "time", "bench": "optimizer", "name": "stochastic", "dtype": "fp32", "tensors": 1, "elements": 4096,
     "p50_ms": 0.5, "copy_share": 0.8},
    {"kind": "time", "bench": "step", "name": "peft-lora", "dtype": "fp32", "reason": "is not installed"},
]  # fmt: skip


def run_of(path: Path, minutes: float = 1.0) -> Run:
    return Run(torch.device("cpu"), SMALL, Report(path / "runs/report.md"), time.monotonic() + 60 * minutes)


def console() -> Console:
    return Console(file=io.StringIO())


def test_the_first_line_is_the_verdict_and_the_next_ones_the_machine() -> None:
    """Card, driver, versions, commit; then what passed; then a table for each kind of number."""
    head = head_of(FINE)
    assert head[0] == "# RTX 3090: nothing wrong so far"
    assert head_of([*FINE, {"kind": "end"}])[0] == "# RTX 3090: nothing wrong"
    text = "\n".join(head)
    for said in ("driver 580.65 (CUDA 13.0)", "compute capability 8.6, 24.9 of 25.3 GB free", "commit abc1234",
                 "torch 2.14.1+cu130", "tests/ops: 400 passed, 0 failed, 1 skipped", "kernels right: 1 of 1",
                 "| lisa | bf16 | 6.2000 | 6.0000 | 6.0100 | 2.0e-03 | 3.0 |", "| +0.10% |",
                 "| optimizer | stochastic | fp32 | 1 × 4096 | 0.5 |"):  # fmt: skip
        assert said in text
    assert "peft None" not in text
    assert "peft-lora" not in text


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "kernel": ({"kind": "kernel", "op": "fold_", "seconds": 0.1, "problem": "no PTX"}, "kernel fold_: no PTX"),
    "method": ({**FINE[3], "losses": [], "problem": "RuntimeError: x"}, "method lisa bf16: RuntimeError: x"),
    "memory": ({**FINE[4], "problem": "+9.00% measured above planned"}, "memory lisa bf16: +9.00%"),
    "test": (
        {**FINE[5], "failed": 1, "failures": [{"test": "tests.ops.test_fold::test_x", "message": "off by one"}]},
        "tests.ops.test_fold::test_x: off by one",
    ),
    "stage": (
        {"kind": "stage", "name": "times", "seconds": 1.0, "outcome": "failed", "reason": "full"}, "times failed: full",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_in_the_first_line(kind: str) -> None:
    """The first of all troubles, and every one in a list below."""
    row, said = WRONG[kind]
    head = head_of([*FINE, row])
    assert head[0].startswith(f"# RTX 3090: 1 found wrong so far, the first: {said}")
    assert any(line.startswith(f"1. {said}") for line in head)


def stage_of(name: str, act: Callable[[Run], None]) -> Callable[[Run], None]:
    act.__name__ = name
    return act


def raising(error: Exception) -> Callable[[Run], None]:
    def act(run: Run) -> None:
        raise error

    return act


def test_a_stage_that_fails_is_told_and_the_next_one_runs(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    stages = (stage_of("memory", raising(RuntimeError("a\nb"))), stage_of("times", lambda run: None))
    report(run, console(), stages)
    rows = read_report(run.report.path)
    assert [(row["name"], row["outcome"], row["reason"]) for row in rows_of(rows, "stage")] == [
        ("memory", "failed", "RuntimeError: a b"), ("times", "done", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("found", ["no GPU", "a kernel", "codes", "a crash"])
def test_it_stops_where_the_rest_would_be_meaningless(
    found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Says what, and the file is there: no GPU, a kernel that does not compile, the optimizer's codes wrong."""
    problem = {"a kernel": "no PTX", "codes": "40.0% of the codes of result 2 are others than the CPU's"}.get(found, "")
    trials = [Trial("fold_", 0.1, ""), Trial("adamw8_", 0.1, problem)]
    described = {name: value for name, value in MACHINE.items() if name not in ("kind", "environment")}
    monkeypatch.setattr(gpu, "describe", lambda: described)
    monkeypatch.setattr(gpu, "survey_machine", lambda: Machine("2.13.0+cpu"))
    monkeypatch.setattr(
        gpu, "try_kernels", raising(RuntimeError("bus")) if found == "a crash" else lambda device: trials
    )
    run = run_of(tmp_path)
    if found == "no GPU":
        run.device = torch.device("cuda", 0)
    report(run, console(), (gpu.machine, gpu.kernels, stage_of("methods", raising(AssertionError("ran on")))))
    rows = read_report(run.report.path)
    last, end = rows[-2:]
    assert end == {"kind": "end"}
    assert (last["kind"], last["name"]) == ("stage", "machine" if found == "no GPU" else "kernels")
    assert last["outcome"] == ("failed" if found == "a crash" else "stopped")
    assert {"no GPU": "no NVIDIA driver", "a crash": "bus"}.get(found, problem) in last["reason"]
    assert troubles(rows)


def test_what_there_is_no_time_for_is_left_out(tmp_path: Path) -> None:
    run = run_of(tmp_path, minutes=0.0)
    report(run, console(), (stage_of("times", raising(Meaningless("ran"))),))
    assert troubles(run.report.rows) == ["times left out: the time was over"]


def test_tests_that_fail_are_read_from_pytests_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, and of each failure its name and the first words."""
    xml = (
        '<testsuites><testsuite><testcase classname="tests.a" name="x[cuda]"/><testcase classname="tests.a" name="y">'
        '<failure message="assert 1 == 2&#10; more">...</failure></testcase><testcase classname="tests.b" name="z">'
        '<skipped message="why"/></testcase></testsuite></testsuites>'
    )

    def call(command: list[str], seconds: float) -> str:
        file = next(word for word in command if word.startswith("--junitxml=")).partition("=")[2]
        Path(file).write_text(xml)
        return ""

    monkeypatch.setattr(gpu, "_call", call)
    run = run_of(tmp_path)
    gpu.tests(run)
    (row,) = run.report.rows
    assert (row["passed"], row["failed"], row["skipped"]) == (1, 1, 1)
    assert row["failures"] == [{"test": "tests.a::y", "message": "assert 1 == 2 more"}]


@pytest.mark.slow
def test_the_whole_command_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage, small: rows of every kind, nothing wrong, and the head on the screen."""
    file = tmp_path / "report.md"
    assert main(["--device", "cpu", "--small", "--output", str(file)]) == 0
    rows = read_report(file)
    assert [row["name"] for row in rows_of(rows, "stage")] == [stage.__name__ for stage in gpu.STAGES]
    assert {row["kind"] for row in rows} == {"machine", "kernel", "method", "memory", "tests", "time", "stage", "end"}
    assert capsys.readouterr().out.startswith("# no GPU: nothing wrong\n")


def test_a_device_that_is_none_is_refused(tmp_path: Path) -> None:
    assert main(["--device", "gpu", "--output", str(tmp_path / "report.md")]) == 2
    assert not list(tmp_path.iterdir())
