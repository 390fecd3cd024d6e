"""The CPU that is here as a machine: every operation of a step is run on real tensors, and its time is what is told."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lisa_kernels import BAdam, FullFineTune, GaLore, LoRA, OwLore
from lisa_kernels.plan import this_cpu
from lisa_kernels.plan.rehearsal import rehearse
from lisa_kernels.plan.result import Plan
from lisa_kernels.plan.this_cpu import ThisCpu
from lisa_kernels.plan.work import Operation

from .small_runs import workload


def ticking() -> Any:
    """Return a clock that goes on by one second whenever it is asked."""
    return itertools.count().__next__


@pytest.fixture(scope="module")
def cpu() -> ThisCpu:
    return ThisCpu(ticking())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "method",
    [FullFineTune(), OwLore(2, rank=4, scores="uniform"), GaLore(rank=4), LoRA(rank=4), BAdam()],
    ids=lambda value: value.name,
)
def test_every_operation_of_a_step_can_be_measured(cpu: ThisCpu, method: Any, dtype: str) -> None:
    asked = workload("llama", method, dtype=dtype)
    found = Plan(asked, rehearse(asked)).duration(cpu)
    # A second each by that clock, and what it counts as the overhead of one.
    assert 0.9 * found.launches <= sum(found.step) / 2 < 40 * found.launches


def test_operations_alike_are_measured_once() -> None:
    calls: list[int] = []

    def slow(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x

    cpu, asked = ThisCpu(ticking()), Operation("key", (slow, (torch.empty(2, device="meta"),), {}), 0, 8, False)
    slow.overloadpacket = None  # type: ignore[attr-defined]
    first, second = cpu.seconds(asked), cpu.seconds(asked)
    assert first == second
    assert len(calls) == this_cpu.LEAST_REPEATS


def test_a_large_product_is_measured_on_some_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what moves more than memory holds twice by the rate of a copy."""
    rows: list[int] = []

    def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        rows.append(len(left))
        return left

    cpu = ThisCpu(ticking())
    monkeypatch.setattr(this_cpu, "matmul", multiply)
    left, right = torch.empty(4096, 64, device="meta"), torch.empty(64, 1024, device="meta")
    mm = torch.ops.aten.mm.default
    products = int(4 * this_cpu.MOST_PRODUCTS)
    (low, high), bound = cpu.seconds(Operation("product", (mm, (left, right), {}), products, 0, False))
    assert bound == "matrices"
    assert set(rows) == {1024}
    assert (low + high) / 2 == pytest.approx(4.0 + cpu._overhead)
    monkeypatch.setattr(this_cpu, "COPY_BYTES", 1 << 20)
    add = (torch.ops.aten.add.Tensor, (left, left), {})
    huge = Operation("huge", add, 0, 2 * this_cpu.MOST_BYTES, False)
    assert sum(cpu.seconds(huge)[0]) / 2 >= huge.bytes / (2 << 20)
