"""What a plan says of weights that are streamed from the host: the bytes that a run copies, and when they cost time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from families import llama, tokens, train
from rich.console import Console

from lisa_kernels import GaLore, OwLore, attach
from lisa_kernels.layers import checkpoint_blocks
from lisa_kernels.methods import Method
from lisa_kernels.plan.gpu_memory import GpuMemory
from lisa_kernels.plan.machines import DISK, LINK, Seconds
from lisa_kernels.plan.rehearsal import Workload, rehearse
from lisa_kernels.plan.result import Plan
from lisa_kernels.plan.streaming import StreamedBytes, copied_by_turn, print_streamed

from .test_duration import Counting

LAYERS = 4
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
METHODS: dict[str, Method] = {
    "galore": GaLore(rank=4, gap=50, embeddings="low-rank"),
    "owlore": OwLore(active_layers=1, period=50, gap=50, rank=4, scores="uniform", embeddings="frozen"),
}


def plan_of(method: Method, **changes: Any) -> Plan:
    settings: dict[str, Any] = {"seq_len": 6, "dtype": "fp32", "resting": "nf4", "resting_where": "host", **changes}
    workload = Workload(llama(LAYERS, **SIZES).config, method, **settings)
    return Plan(workload, rehearse(workload, gpu=GpuMemory.here()))


def copied_in_a_step(
    method: Method, checkpointing: bool, accumulate: int, seed: int = 0, where: str = "host"
) -> tuple[int, Any]:
    """Return the bytes that a step copies to where it computes, once it is as the one before; and the optimizer."""
    model = llama(LAYERS, **SIZES)
    if checkpointing:
        checkpoint_blocks(model)
    optimizer = attach(model, method, seed=seed, resting="nf4", resting_where=where)
    copied: list[int] = []
    assert optimizer.layout.streamed is not None
    optimizer.layout.streamed.watchers.append(copied.append)
    for step in range(4):
        copied.clear()
        read = optimizer.code_bytes_read
        for batch in range(accumulate - 1):
            model(**tokens(1, 6, seed=10 * step + batch)).loss.backward()
        train(model, optimizer, tokens(1, 6, seed=10 * step + 9))
    if where != "host":
        # The last page asked for is on its way, and the one of the step before is there.
        optimizer.layout.streamed.file._thread.submit(lambda: None).result()
        assert optimizer.code_bytes_read - read == sum(copied)
    return sum(copied), optimizer


@pytest.fixture(scope="module")
def galore() -> Plan:
    """A plan of three micro-batches a step."""
    return plan_of(METHODS["galore"], gradient_checkpointing=False, accumulate=3)


def test_a_step_copies_what_was_planned(galore: Plan) -> None:
    """To the byte; the host holds the pages, the device two of them."""
    plan = galore
    copied, optimizer = copied_in_a_step(METHODS["galore"], False, 3)
    planned, streamed = plan.streamed, optimizer.layout.streamed
    assert planned is not None
    assert planned.bytes_per_step == copied > 0
    assert (planned.host_bytes, planned.buffer_bytes) == (streamed.nbytes, 2 * streamed.nbytes // LAYERS)
    assert set(planned.step_bytes) == {"forward", "backward"}
    assert planned.as_dict()["bytes_per_step"] == copied
    assert Plan(dataclasses.replace(plan.workload, resting_where=None), plan.trace).streamed is None


def test_a_step_reads_what_was_planned(galore: Plan, tmp_path: Path) -> None:
    """From a file, which has the pages; the host holds no more than the device. A plan needs no folder."""
    plan = Plan(dataclasses.replace(galore.workload, resting_where=str(tmp_path / "none")), galore.trace)
    copied, optimizer = copied_in_a_step(METHODS["galore"], False, 3, where=str(tmp_path))
    planned, streamed = plan.streamed, optimizer.layout.streamed
    assert planned is not None
    assert planned.bytes_per_step == copied == galore.streamed.bytes_per_step  # type: ignore[union-attr]
    assert planned.file_bytes == streamed.file.nbytes == streamed.nbytes
    assert planned.host_bytes == planned.buffer_bytes == sum(buffer.numel() for buffer in streamed.held())
    machine = Linked(1e-15)
    machine.is_cpu = True
    found = plan.duration(machine)
    # From what a thread can read at most to a bad day of the slowest disk; no link takes as long.
    assert found.parts["waiting for weights"] == pytest.approx((copied / 4.1e9, copied / 0.55e9 / 0.35))
    assert (DISK in found.bounds, LINK in found.bounds) == (True, False)
    machine.seconds_per_byte = 1.0
    assert plan.duration(machine).parts["waiting for weights"] == pytest.approx((copied, 2 * copied))


@pytest.mark.slow
def test_backwards_that_end_early_copy_less() -> None:
    """Of a draw in the middle, as a plan's times have it."""
    planned = plan_of(METHODS["owlore"]).streamed
    assert planned is not None
    copied, optimizer = copied_in_a_step(METHODS["owlore"], True, 1)
    assert optimizer.active_layers == [2]
    assert planned.bytes_per_step == copied == planned.host_bytes


def test_what_follows_is_known_from_the_second_step_on() -> None:
    """Both ends of a forward and a backward over five pages, and where there is one page, or are two."""
    forwards, backwards = [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]
    order, one = [*forwards, *backwards[1:]], 512
    assert copied_by_turn([one] * 5, order) == [0, one, one, one, 0, one, one, one, 0]
    assert copied_by_turn([one], [0, 0]) == [0, 0]
    assert copied_by_turn([one, 2 * one], [0, 1, 0]) == [0, 0, 0]


class Linked(Counting):
    """A machine whose link takes as long for a byte as is said."""

    def __init__(self, seconds_per_byte: float) -> None:
        self.seconds_per_byte = seconds_per_byte

    def copy_seconds(self, nbytes: float) -> Seconds:
        return Seconds(nbytes * self.seconds_per_byte, 2 * nbytes * self.seconds_per_byte)


def test_copies_cost_what_they_take_longer_than_the_work_beside_them(galore: Plan) -> None:
    plan = galore
    fast, slow = plan.duration(Linked(1e-9)), plan.duration(Linked(1.0))
    assert "waiting for weights" not in fast.parts
    streamed = plan.streamed
    assert streamed is not None
    beside = sum(fast.parts[part].low for part in ("forward", "backward"))
    assert slow.step.low == pytest.approx(fast.step.low - beside + streamed.bytes_per_step)
    assert slow.bound_by == LINK
    on_cpu = Linked(1e-3)
    on_cpu.is_cpu = True
    # There a copy is work like any other.
    waits = plan.duration(on_cpu).parts["waiting for weights"]
    assert waits.low == pytest.approx(1e-3 * streamed.bytes_per_step)


def test_a_plan_says_what_crosses_over(capsys: pytest.CaptureFixture[str]) -> None:
    streamed = StreamedBytes(4_000_000_000, 250_000_000, {"forward": 4_000_000_000, "backward": 3_000_000_000})
    print_streamed(streamed, Console(width=300))
    print_streamed(None, Console())
    [said] = capsys.readouterr().out.splitlines()
    assert "take 4.00 GB of locked host memory, and 250.0 MB of the device" in said
    assert "7.00 GB of them cross over a step beside its work: 0.52-0.68 s by PCIe 3" in said
    assert dataclasses.asdict(streamed)["host_bytes"] == 4_000_000_000
    print_streamed(dataclasses.replace(streamed, host_bytes=250_000_000, file_bytes=4_000_000_000), Console(width=300))
    [said] = capsys.readouterr().out.splitlines()
    assert "take 4.00 GB of a file, 250.0 MB of locked host memory, and 250.0 MB of the device" in said
    assert "7.00 GB of them are read a step beside its work, from the disk unless memory caches them: 1.71-" in said
    assert "36.36 s by SATA; 7.00 GB of them cross over" in said
