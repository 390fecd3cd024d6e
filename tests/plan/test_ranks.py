"""What a plan says travels between ranks is what does, and each rank's peak has the copies that travel."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import on_ranks
from distributed.runs import batch, model_of
from torch import Tensor

from lisa_kernels import LISA, GaLore, LoRA, OwLore, attach
from lisa_kernels.methods import Method, agreement
from lisa_kernels.plan.links import LINKS
from lisa_kernels.plan.ranks import Travel
from lisa_kernels.plan.rehearsal import Workload, rehearse
from lisa_kernels.plan.work import WorkLog

STEPS = 4
# Each found anew at every switch, refreshed once in so many steps, and not at all.
OWLORE = OwLore(active_layers=1, period=2, rank=8, gap=0, scores="uniform", embeddings="frozen")
CASES: dict[str, tuple[Method, str | None]] = {
    "OwLore": (OWLORE, None),
    "OwLore, mixed": (OWLORE, None),
    "GaLore": (GaLore(rank=8, gap=STEPS - 1, embeddings="low-rank"), None),
    "LISA, bf16": (LISA(active_layers=2, period=2), "bf16"),
    "LoRA": (LoRA(rank=8), None),
}  # fmt: skip


def summed(rank: int, name: str) -> tuple[int, list[list[int]]]:
    """Return the bytes of all tensors that are summed in a real run's steps, and the layers of its periods."""
    method, wire = CASES[name]
    found = 0

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal found
            found += tensor.nbytes
            return real(tensor, *args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        if "mixed" in name:
            patch.setattr(agreement, "kind_of", lambda device: f"card {rank}")
        optimizer = attach(model := model_of(), method, lr=3e-3, wire_dtype=wire)
        for collective in ("all_reduce", "broadcast"):
            patch.setattr(dist, collective, counting(getattr(dist, collective)))
        for step in range(STEPS):
            model(**batch(step, rank)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return found, optimizer.history


def everything(rank: int) -> dict[str, tuple[int, list[list[int]]]]:
    return {name: summed(rank, name) for name in CASES}


@pytest.fixture(scope="module")
def real() -> list[dict[str, tuple[int, list[list[int]]]]]:
    return on_ranks(everything)


def workload(method: Method, ranks: int = 2, wire: str | None = None, **more: Any) -> Workload:
    config = model_of().config
    return Workload(config, method, batch_size=4, seq_len=32, dtype="fp32", ranks=ranks, wire_dtype=wire, **more)


def travel(method: Method, wire: str | None = None, ranks: int = 2, **more: Any) -> Travel:
    work = WorkLog()
    rehearse(workload(method, ranks, wire, **more), work=work)
    assert work.travel is not None
    return work.travel


def owlore(found: Travel, history: list[list[int]]) -> float:
    # Of a draw that comes twice in turn the bases stay; the last one has had no step.
    draws = history[: STEPS // 2]
    return (found.first_bases + 2 * found.broadcast) * (
        1 + sum(draw != before for before, draw in itertools.pairwise(draws))
    )


BASES: dict[str, Callable[[Travel, list[list[int]]], float]] = {
    "OwLore": owlore,
    "OwLore, mixed": owlore,
    "GaLore": lambda found, _: found.lasting + (STEPS - 1) * found.sketches,
    "LISA, bf16": lambda found, _: 0,
    "LoRA": lambda found, _: found.lasting,
}


@pytest.mark.parametrize("name", CASES)
def test_planned_bytes_are_those_that_are_sent(name: str, real: list[dict[str, tuple[int, list[list[int]]]]]) -> None:
    """Counted where the collectives begin, on two ranks, over steps with switches and refreshes; byte for byte."""
    method, wire = CASES[name]
    planned = travel(method, wire, mixed_cards="mixed" in name)
    assert (planned.broadcast > 0) == ("mixed" in name)
    for each in real:
        counted, history = each[name]
        assert counted == STEPS * planned.gradients + BASES[name](planned, history)


@pytest.mark.slow
def test_a_7b_model_sends_what_is_promised() -> None:
    """OwLore(5, r = 128): gradients of a step, and bases on average, those refreshed within a period with them."""
    work = WorkLog()
    method = OwLore(active_layers=5, period=50, rank=128, scores="uniform")
    rehearse(Workload("preset:llama-2-7b", method, seq_len=16, ranks=2), work=work)
    assert work.travel is not None
    assert work.travel.gradients / 1e6 == pytest.approx(141.65, abs=0.01)
    assert work.travel.sketches / 1e6 == pytest.approx(10.10, abs=0.01)
    # The first bases of five layers in 50 steps, and of embedding and head once in 200.
    assert work.travel.first_bases / 50 / 1e6 == pytest.approx(9.0, abs=0.01)


def test_more_micro_batches_send_no_more() -> None:
    """Gradients leave with the last one."""
    assert travel(CASES["LISA, bf16"][0], accumulate=3).gradients == travel(CASES["LISA, bf16"][0]).gradients


def test_each_rank_holds_a_copy_that_travels() -> None:
    """Its bytes are in the plan while it is summed, and gone after."""
    method = LISA(active_layers=2, period=2)
    alone, ranked = (rehearse(workload(method, ranks)) for ranks in (1, 2))
    copied = travel(method).gradients
    assert [event.bytes for event in ranked.events].count(copied) == 3
    assert copied not in [event.bytes for event in alone.events]
    assert ranked.timeline()[-1] == alone.timeline()[-1]


def test_a_link_takes_as_long_as_its_bytes_and_answers() -> None:
    """Each rank sends every byte to its neighbour, less what stays, twice; of three ranks more than of two."""
    two, three = (travel(LISA(active_layers=2, period=2), ranks=ranks) for ranks in (2, 3))
    gigabit = LINKS[0]
    at_least = two.gradients / 0.125e9
    seconds = two.seconds(gigabit)
    assert at_least < seconds.low < seconds.high
    assert three.seconds(gigabit).low > 4 / 3 * at_least
    assert two.as_dict()["links"][0]["step_seconds_low"] == seconds.low
    assert torch.tensor([two.seconds(link).low for link in LINKS]).diff().lt(0).all()
