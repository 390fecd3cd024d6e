"""The benchmark of bases counts and leaves out what it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.basis_ablation import Variant, batches, carry, keep, reset, small_llama, watched
from bench.basis_steps import llama, timed_steps
from lisa_kernels import GaLore
from lisa_kernels.layers import LowRankLinear
from lisa_kernels.methods import SampledAdamW

MATRICES = 2 * 7


def test_steps_are_timed_and_their_bases_counted() -> None:
    """First bases, then refreshes, spread over the gap."""
    model = llama(layers=2, width=32, intermediate=48, heads=4)
    taken = timed_steps(model, GaLore(rank=4, gap=6, embeddings="frozen"), count=13, batch=1, seq_len=8)
    assert taken[0]["due"] == MATRICES
    assert max(step["due"] for step in taken[1:]) == 3
    assert sum(step["due"] for step in taken[7:]) == MATRICES
    assert all(step["seconds"] > 0 for step in taken)


@pytest.mark.parametrize(("treatment", "updates"), [(carry, 2), (keep, 2), (reset, 1)])
def test_a_reset_forgets_the_moments_and_the_others_do_not(
    treatment: Callable[[SampledAdamW, LowRankLinear], None], updates: int
) -> None:
    """Bases are found at the first step and refreshed at the next; only a reset counts updates from one again."""
    model = small_llama(seed=0)
    optimizer = watched(Variant("", 1, treatment), model, seed=0)
    for _, batch in zip(range(2), batches(torch.arange(1000) % 256, rows=1, seed=0)):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    slots = next(group for group in optimizer.param_groups if group["name"] == "slots")["params"]
    assert {int(optimizer.state[slot]["step"]) for slot in slots} == {updates}
