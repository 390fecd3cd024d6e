"""What masters take by plan is what they take: in memory, in files, and written to the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import llama, tokens, train

from lisa_kernels import LISA, GaLore, LoRA, OwLore, attach, plan
from lisa_kernels.layers import AccumulatingSlot
from lisa_kernels.methods import Method
from lisa_kernels.plan.host import host_bytes
from lisa_kernels.plan.rehearsal import Workload, rehearse
from lisa_kernels.plan.result import Plan

METHODS: dict[str, Method] = {
    "owlore": OwLore(active_layers=2, period=5, gap=2, rank=4, scores="uniform"),
    "owlore-frozen": OwLore(active_layers=1, period=2, rank=4, scores="uniform", embeddings="frozen"),
    "galore": GaLore(rank=4, gap=3, embeddings="low-rank"),
    "lora": LoRA(rank=4),
    "lisa": LISA(active_layers=1, period=3, embeddings="frozen"),
}
STEPS = 12
# Wide enough for the headers of files to be little beside what is in them.
WIDE = {"layers": 4, "hidden_size": 128, "intermediate_size": 256}


def masters_of(model: Any) -> int:
    """Return the bytes of an attached model's masters."""
    layers = [module for module in model.modules() if isinstance(module, AccumulatingSlot)]
    return sum({id(layer.stored_weight): layer.stored_weight.nbytes for layer in layers}.values())


SELDOM = [pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "owlore"]


@pytest.mark.parametrize("name", ["owlore", *SELDOM])
def test_a_run_writes_about_what_was_planned(name: str, tmp_path: Path) -> None:
    """Less, where a layer is drawn twice in a row; more by the headers of files."""
    llama(**WIDE).save_pretrained(tmp_path / "model")
    model = llama(**WIDE).from_pretrained(tmp_path / "model").train()
    workload = Workload(str(tmp_path / "model"), METHODS[name], dtype="fp32", resting="nf4", masters="files")
    planned = host_bytes(workload, STEPS)
    assert planned is not None
    optimizer = attach(model, METHODS[name], lr=1e-3, resting="nf4", masters=tmp_path / "masters")
    assert optimizer.master_bytes_written == 0
    assert planned.file_cache_bytes == masters_of(model)
    assert planned.memory_bytes == planned.written_at_start == 0
    for step in range(STEPS):
        train(model, optimizer, tokens(1, 4, seed=step))
    model.state_dict()
    optimizer.detach()
    assert planned.written_in_run is not None
    assert 0.6 < optimizer.master_bytes_written / planned.written_in_run < 1.15


def test_random_weights_are_written_first(tmp_path: Path) -> None:
    method = METHODS["owlore"]
    planned = host_bytes(Workload("preset:tiny", method, dtype="fp32", resting="nf4", masters="files"), None)
    assert planned is not None
    assert planned.written_at_start == planned.file_cache_bytes > 0
    assert planned.written_in_run is None


@pytest.mark.slow
def test_mapped_masters_take_none_of_the_memory_that_a_cpu_plan_counts() -> None:
    """There host and device are one."""
    workloads = [
        Workload("preset:tiny", METHODS["owlore"], seq_len=64, dtype="bf16", resting="nf4", masters=masters)
        for masters in (None, "files")
    ]
    in_memory, in_files = (Plan(workload, rehearse(workload)) for workload in workloads)
    assert in_memory.host is not None
    assert in_files.host is not None
    assert in_memory.host.memory_bytes == in_files.host.file_cache_bytes
    saved = in_memory.split["weights"] - in_files.split["weights"]
    # A tensor that stands for a master has one number.
    assert 0 <= in_files.host.file_cache_bytes - saved < 200


@pytest.mark.slow
def test_they_decide_no_bytes_of_a_device() -> None:
    settings: dict[str, Any] = {"seq_len": 64, "resting": "nf4"}
    on_gpu = [plan("preset:tiny", METHODS["owlore"], masters=masters, **settings) for masters in ("host", "files")]
    assert on_gpu[0].peak_bytes == on_gpu[1].peak_bytes
    told = on_gpu[1].as_dict()["host"]
    assert told["disk_bytes"] > told["file_cache_bytes"] > told["memory_bytes"] == 0
    assert plan("preset:tiny", METHODS["owlore"], seq_len=64).as_dict()["host"] is None
