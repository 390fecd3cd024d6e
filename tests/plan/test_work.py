"""What is counted of the operations of a rehearsed step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lisa_kernels import FullFineTune, LoRA, OwLore
from lisa_kernels.plan.rehearsal import Workload, empty_batch, prepare, rehearse
from lisa_kernels.plan.work import Operation, WorkLog

from .small_runs import LAYERS, real_model, workload

STEADY = "step 2:"


def log_of(asked: Workload) -> WorkLog:
    work = WorkLog()
    rehearse(asked, work=work)
    return work


def total(work: WorkLog, part: str, field: str) -> int:
    counts = work.of_phases(lambda phase: phase.startswith(STEADY))[part]
    found: list[tuple[Operation, int]] = [(work.operations[key], n) for key, n in counts.items()]  # type: ignore[misc]
    return sum(getattr(operation, field) * count for operation, count in found)


def full(**changes: Any) -> Workload:
    return dataclasses.replace(workload("llama", FullFineTune()), dtype="fp32", **changes)


def test_products_are_those_that_torch_counts_in_a_real_step() -> None:
    asked = full(gradient_checkpointing=False)
    model = real_model(asked)
    optimizer = prepare(model, asked)
    # Which torch leaves out.
    in_place = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(**empty_batch(asked, torch.device("cpu"))).loss.backward()
        optimizer.step()
    work = log_of(asked)
    counted = sum(total(work, part, "products") for part in ("forward", "backward", "optimizer"))
    # torch does not count the CPU's fused attention; of so few tokens it is a small part.
    assert counter.get_total_flops() < counted < 1.1 * counter.get_total_flops()


def test_each_block_is_recomputed_once_and_no_other() -> None:
    """A plan that left recomputation out, or counted a block twice, would be wrong by a third of a step."""
    plain = log_of(full(gradient_checkpointing=False))
    one, every = (log_of(full(checkpointed_blocks=blocks)) for blocks in (1, LAYERS))
    for part in ("forward", "backward"):
        assert total(every, part, "products") == total(plain, part, "products")
    assert total(plain, "recomputation", "products") == 0
    assert total(every, "recomputation", "products") == LAYERS * total(one, "recomputation", "products")
    # Of a block the last product is not made again: nothing needs what it gives.
    assert 0.7 < total(every, "recomputation", "products") / blocks_products(plain) < 1.0


def blocks_products(work: WorkLog) -> int:
    """Return the forward products without the head's, which are the widest."""
    counts = work.of_phases(lambda phase: phase.startswith(STEADY))["forward"]
    by_shape: Counter[int] = Counter()
    for key, count in counts.items():
        operation = work.operations[key]
        assert operation is not None
        by_shape[operation.products] += count * operation.products
    head = max((shape for shape in by_shape if shape), key=lambda shape: shape)
    return sum(by_shape.values()) - by_shape[head]


@pytest.mark.parametrize("method", [OwLore(2, rank=4, scores="uniform"), LoRA(rank=4)], ids=lambda m: m.name)
def test_low_rank_layers_count_alike_whole_and_taken_apart(method: Any) -> None:
    """On a GPU they are several operations, on a CPU one with a formula."""
    from lisa_kernels.plan.gpu_memory import GpuMemory

    asked = dataclasses.replace(workload("llama", method), dtype="fp32")
    whole, apart = WorkLog(), WorkLog()
    rehearse(asked, work=whole)
    rehearse(asked, gpu=GpuMemory.here(), work=apart)
    for part in ("forward", "backward"):
        assert total(whole, part, "products") == pytest.approx(total(apart, part, "products"), rel=0.02)


def test_bytes_are_read_and_written_ones() -> None:
    """Views and allocations move nothing, expanded dimensions count once, of a table only the rows looked up."""
    work = WorkLog()

    def note(func: Any, *args: Any) -> int:
        before = set(work.operations)
        work(func, args, {}, func(*args), "step 2: forward", "forward")
        new = [work.operations[key] for key in work.operations if key not in before]
        return sum(operation.bytes for operation in new if operation is not None)

    aten = torch.ops.aten
    x, ids = torch.zeros(8, 4), torch.zeros(3, dtype=torch.int64)
    assert note(aten.add.Tensor, x, x) == 3 * 128
    assert note(aten.add_.Tensor, x, torch.ones(8, 4)) == 3 * 128
    assert note(aten.mul.Tensor, x, torch.zeros(1, 4).expand(8, 4)) == 128 + 16 + 128
    assert note(aten.t.default, x) == 0
    assert note(aten.empty_like.default, x) == 0
    assert note(aten.embedding.default, torch.zeros(1000, 4), ids) == 24 + 2 * 48
