"""`bench step --model` on a device: steps part by part, in no more bytes than planned; times mean nothing here."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from families import common
from transformers import LlamaConfig

from bench import device_rates
from bench.memory_runs import real_model
from bench.model_step import Bench, measure
from bench.model_step_entries import parse_entries
from bench.step_cases import Case
from lisa_kernels import FullFineTune
from lisa_kernels.plan.machines import CARDS
from lisa_kernels.plan.rehearsal import Workload

NAMES = ("owlore-frozen", "peft-lora")


@pytest.mark.order("late")
@pytest.mark.parametrize("name", NAMES)
def test_steps_on_a_device_are_those_of_their_plan(name: str, tmp_path: Path) -> None:
    """The peak is below the plan's, rows have every part, and no fault is noted."""
    LlamaConfig(**common(num_hidden_layers=3)).save_pretrained(tmp_path)
    device = torch.device("cuda", 0)
    workload = Workload(str(tmp_path), FullFineTune(), seq_len=16, dtype="bf16")
    bench = Bench(workload, device, real_model(workload, device), [CARDS["t4"]], 2, time.monotonic() + 3600)
    row = measure(bench, parse_entries(name, Case(layers=3, rank=4, active_layers=2, lora_rank=2, galore_rank=4))[0])
    assert row.reason is None
    # Attention is many operations here, and one of a plan; and bases are looked for until the host hears of a good one.
    assert row.operations is not None
    assert row.planned_operations is not None
    assert row.operations > row.planned_operations
    assert row.peak_bytes is not None
    assert row.planned_bytes is not None
    assert row.peak_bytes <= row.planned_bytes
    assert row.step_ms
    assert row.recomputation_ms
    assert row.launches is None


@pytest.mark.order("late")
def test_rates_of_a_device_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller products than on a card: they are computed on the CPU."""
    monkeypatch.setattr(device_rates, "SIDES", {2: 32, 4: 32})
    monkeypatch.setattr(device_rates, "LAUNCHES", 10)
    rates = device_rates.measure_rates(torch.device("cuda", 0), torch.bfloat16)
    assert min(rates.copy_gb_s, rates.tflops, rates.tflops_fp32, rates.launch_us, rates.host_us) > 0
