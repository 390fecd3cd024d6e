"""The measured peak of a run beside the planned one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lisa_kernels.errors import InputError, NotRehearsedError
from lisa_kernels.train import memory
from lisa_kernels.train.memory import MemoryMeter, PlannedMemory, describe_held, planned_memory
from lisa_kernels.train.options import FineTuneOptions

MB = 10**6
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_a_meter_sees_what_came_after_it_and_went_again() -> None:
    """400 MB that live for a moment are the peak; what was there before is not."""
    before = torch.ones(50 * MB)
    meter = MemoryMeter.start(CPU)
    during = torch.ones(100 * MB)
    del during
    assert 395 * MB < meter.peak_bytes() < 480 * MB
    assert len(before) == 50 * MB


def test_a_second_meter_does_not_see_the_peak_before_it() -> None:
    """Two runs in one process are measured apart, where the system lets a process reset its peak."""
    during = torch.ones(100 * MB)
    del during
    meter = MemoryMeter.start(CPU)
    assert meter.peak_bytes() < 100 * MB


class Measured(MemoryMeter):
    """A meter that has measured 2 GB."""

    def peak_bytes(self) -> int:
        return 2000 * MB


@pytest.mark.parametrize(("planned", "warns"), [(1906, False), (1904, True), (3000, False), (None, False)])
def test_a_gpu_run_warns_above_five_percent(planned: int | None, warns: bool) -> None:
    meter = Measured(device=GPU, before=0)
    warning = meter.warning(None if planned is None else planned * MB)
    assert (warning is not None) == warns
    assert warning is None or "GB more than was planned" in warning


def test_a_cpu_run_never_warns() -> None:
    """The process's growth is more than tensors: it says nothing of whether the plan was kept."""
    assert Measured(device=CPU, before=0).warning(MB) is None


def test_the_description_says_what_each_figure_counts() -> None:
    assert Measured(device=GPU, before=0).describe(1600 * MB) == "peak memory 2.00 GB, 1.60 GB planned (+25.0%)"
    assert Measured(device=CPU, before=0).describe(None) == "peak memory: the process grew by 2.00 GB"
    text = Measured(device=CPU, before=0).describe(1600 * MB)
    assert text.startswith("peak memory: the process grew by 2.00 GB (libraries")
    assert text.endswith("the plan's 1.60 GB count tensors alone")


def test_tensors_are_compared_with_tensors() -> None:
    held = describe_held({"weights": 500 * MB, "bases": 12 * MB}, {"weights": 500 * MB, "bases": 10 * MB})
    assert held == "tensors held before a step: 512.0 MB, 510.0 MB planned (+0.4%)"
    assert str(describe_held({"weights": 10**9 - 1}, {"weights": 10**9})).endswith("(+0.0%)")
    assert describe_held({}, {"weights": 1}) is None
    assert describe_held({"weights": 1}, {}) is None


def planned(plan: Any) -> tuple[PlannedMemory | None, str]:
    out = io.StringIO()
    options = FineTuneOptions("preset:tiny", "stdlib", Path())
    return planned_memory(options, plan, Console(file=out, width=200)), out.getvalue()


def test_a_plan_is_asked_with_the_options_of_the_run() -> None:
    found, text = planned(lambda options: PlannedMemory(1000 * MB * (options.model == "preset:tiny")))
    assert (found, text) == (PlannedMemory(1000 * MB), "planned peak memory: 1.00 GB\n")


def test_what_ranks_send_is_told_beside_the_peak() -> None:
    _, text = planned(lambda options: PlannedMemory(1000 * MB, travel=["each sends 1 MB", "and no more"]))
    assert text.splitlines() == ["planned peak memory: 1.00 GB", "each sends 1 MB", "and no more"]


def test_a_run_that_cannot_be_rehearsed_goes_on_and_says_why() -> None:
    def fails(options: FineTuneOptions) -> PlannedMemory:
        raise NotRehearsedError("no such thing.")

    assert planned(fails) == (None, "note: the memory of this run is not planned: no such thing.\n")


def test_what_the_run_would_refuse_is_refused_by_its_plan() -> None:
    """Before the model is loaded."""

    def fails(options: FineTuneOptions) -> PlannedMemory:
        raise InputError("rank 1000 is more than a layer allows.")

    with pytest.raises(InputError, match="rank 1000"):
        planned(fails)


def test_where_the_peak_cannot_be_reset_the_last_one_is_the_base(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on other systems than Linux: too little is measured then rather than too much."""
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    during = torch.ones(100 * MB)
    del during
    assert MemoryMeter.start(CPU).peak_bytes() < 100 * MB
