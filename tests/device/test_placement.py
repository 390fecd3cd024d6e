"""A command's run on the GPU that it is told, gone on with on another; and the report of `make gpu` on a device."""

from __future__ import annotations

import io
import shutil
import time
from pathlib import Path

import pytest
import torch
from families import common
from rich.console import Console
from train.small_run import arguments, write_text
from transformers import LlamaConfig

from bench import gpu
from bench.gpu_report import Report, rows_of, troubles
from lisa_kernels import trial
from lisa_kernels.cli import main
from lisa_kernels.devices import choose_device, survey_machine


@pytest.mark.order("late")
def test_a_run_takes_the_gpu_that_it_is_told_and_goes_on_on_another(tmp_path: Path) -> None:
    """Nothing is allocated on the other; a kill, and the rest on the first GPU, leaves the same weights."""
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats(0)
    before, run = torch.cuda.memory_allocated(0), tmp_path / "run"
    given = ["--steps", "2", "--save-every", "1", "--period", "1"]
    assert main(arguments(write_text(tmp_path), run, *given, "--device", "cuda:1")) == 0
    assert torch.cuda.max_memory_allocated(0) == before
    whole = (run / "model.safetensors").read_bytes()
    for path in (*run.glob("*.safetensors"), run / "summary.json"):
        path.unlink()
    shutil.rmtree(run / "checkpoint-2")
    assert main(arguments(tmp_path / "text.txt", run, *given, "--device", "cuda:0", "--resume")) == 0
    assert (run / "model.safetensors").read_bytes() == whole


@pytest.mark.order("late")
def test_a_report_on_a_device_has_nothing_wrong(tmp_path: Path) -> None:
    """What one process does of it: programs that it starts have no values here, and methods are in `test_matrix.py`."""
    # As many blocks as are active, as wide as the rank.
    width = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
    LlamaConfig(**common(**width, num_hidden_layers=5, vocab_size=512)).save_pretrained(tmp_path)
    sizes = gpu.SMALL._replace(model=str(tmp_path))
    run = gpu.Run(torch.device("cuda", 0), sizes, Report(tmp_path / "report.md"), time.monotonic() + 3600)
    gpu.report(run, Console(file=io.StringIO()), (gpu.machine, gpu.kernels, gpu.memory))
    assert troubles(run.report.rows) == []
    assert {row["op"] for row in rows_of(run.report.rows, "kernel")} == set(trial._RUNS)
    assert all(row["measured_bytes"] > 0 for row in rows_of(run.report.rows, "memory"))


@pytest.mark.order("late")
def test_the_devices_are_surveyed_without_memory() -> None:
    machine = survey_machine()
    assert len(machine.cards) == 2
    assert machine.cuda is not None
    assert machine.runs_cuda is not None
    assert choose_device("cuda:1", machine) == torch.device("cuda", 1)
