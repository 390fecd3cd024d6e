"""A plan of shards equals what each of two real ranks holds, storage by storage, and what they send, byte for byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import on_ranks
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from lisa_kernels.distributed import GradientReduction, Ranks, settle, share_out
from lisa_kernels.distributed.digests import digest
from lisa_kernels.errors import InputError
from lisa_kernels.layers import find_blocks
from lisa_kernels.plan.options import finetune_command
from lisa_kernels.plan.ranks import STEADY_STEP, Travel
from lisa_kernels.plan.rehearsal import Workload, prepare, rehearse, take_steps
from lisa_kernels.plan.trace import Trace
from lisa_kernels.plan.tracker import StorageTracker
from lisa_kernels.plan.travel_report import check_ranks
from lisa_kernels.plan.work import WorkLog

from .small_runs import METHODS, random_batch, real_model, workload
from .test_rehearsal import sizes

CASES: dict[str, Workload] = {
    "full": workload(method=METHODS["full"], ranks=2, shard=True),
    "lisa": workload(method=METHODS["lisa"], ranks=2, shard=True),
    "owlore": workload(method=METHODS["owlore-low-rank"], ranks=2, shard=True, accumulate=3),
    "badam": workload(method=METHODS["badam"], ranks=2, shard=True, gradient_checkpointing=False),
    "lora": workload(method=METHODS["lora"], ranks=2, shard=True, gradient_checkpointing=False),
}
# Of FSDP, by their names from torch 2.13 on and before.
NEW = hasattr(dist, "all_gather_single")
GATHER, SCATTER = (
    ("all_gather_single", "reduce_scatter_single") if NEW else ("all_gather_into_tensor", "reduce_scatter_tensor")
)


class Quiet(Ranks):
    """Real ranks whose words, which are no tensors of the device where it is a GPU, are not tracked."""

    def meet(self, occasion: str) -> None:
        with _disable_current_modes():
            super().meet(occasion)

    def any_has(self, flags: list[bool]) -> list[bool]:
        with _disable_current_modes():
            return super().any_has(flags)

    def check_equal(self, tensors: Mapping[str, Tensor], when: str) -> None:
        for tensor in tensors.values():
            digest(tensor)


def on_copies(collective: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run a collective untracked: no plan sees gloo's buffers, and its threads let go of what they sent at any time."""
    with _disable_current_modes():
        copies = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, (args, kwargs))
        result = collective(*copies[0], **copies[1])
        for given, copy in zip(tree_leaves((args, kwargs)), tree_leaves(copies)):
            if isinstance(given, Tensor):
                given.copy_(copy)
    return result


def tracked(name: str, mean: bool = False) -> tuple[Trace, dict[str, int]]:
    """Return the storages of a real rank and the bytes of each kind that it sends in a steady step.

    mean: with layers that cost what draws do on average, as plans of time have them, in the place of the most costly.
    """
    given, sent = CASES[name], dict.fromkeys((GATHER, SCATTER), 0)
    model = real_model(given)
    share_out(model, find_blocks(model)[1], torch.device("cpu"))
    settle(model)
    ranks = Quiet(dist.group.WORLD)
    tracker = StorageTracker("cpu")

    def counting(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if kind in sent and tracker.phase_name.startswith(STEADY_STEP):
                sent[kind] += max(value.nbytes for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            return on_copies(real, args, kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch, tracker:
        optimizer = prepare(model, given, mean=mean, reduction=GradientReduction(ranks))
        for kind in (*sent, "all_gather", "all_reduce"):
            patch.setattr(dist, kind, counting(kind, getattr(dist, kind)))
        take_steps(model, optimizer, given, tracker, lambda: random_batch(given))
    return tracker.trace(), sent


def measured(rank: int, name: str) -> tuple[int, dict[str, int], Counter[Any], dict[str, int]]:
    """Return of a real rank its peak, those of phases, its storages, and the bytes that it sends in a steady step."""
    trace, _ = tracked(name)
    _, sent = tracked(name, mean=True)
    return trace.peak_bytes, trace.phases(), Counter(sizes(trace)), sent


QUICK = "lisa"
NAMES = [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_planned_shards_are_a_ranks_own(name: str) -> None:
    """Of rank 0 peak, the peak of every phase and each storage; of both the bytes that they send."""
    given, work = CASES[name], WorkLog()
    planned = rehearse(given)
    rehearse(given, work=work)
    assert isinstance(work.travel, Travel)
    first, other = on_ranks(measured, name)
    peak, phases, storages, sent = first
    assert planned.peak_bytes == peak
    assert planned.phases() == phases
    assert Counter(sizes(planned)) == storages
    # Who holds fewer rows stays below.
    assert other[0] <= peak
    assert other[3] == sent
    assert work.travel.scattered == sent[SCATTER]
    # Of three micro-batches two are taken.
    assert work.travel.gathered == sent[GATHER] * given.accumulate / min(given.accumulate, 2)


def test_a_share_is_less_than_all_and_more_ranks_share_more() -> None:
    given = CASES["full"]
    four, two, alone = (rehearse(replace(given, ranks=n, shard=n > 1)).peak_bytes for n in (4, 2, 1))
    assert four < two < alone


def test_nobody_shares_with_nobody() -> None:
    with pytest.raises(InputError, match="nobody to share"):
        workload(shard=True)
    with pytest.raises(InputError, match="give --ranks too"):
        check_ranks(1, shard=True)


def test_the_command_of_a_plan_has_its_shards() -> None:
    assert finetune_command(CASES["lisa"]).endswith(" --shard")
    assert "--shard" not in finetune_command(workload(ranks=2))
