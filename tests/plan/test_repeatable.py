"""What we compute ourselves is the same bits in every run: no step adds floats in an order that a GPU chooses."""

from __future__ import annotations

import pytest
import torch
from atomic_adds import AtomicAdds

from lisa_kernels import OwLore
from lisa_kernels.plan.rehearsal import Workload, rehearse

from .small_runs import config

ROWS, TOKENS, WIDTH = 2, 24, 32
METHOD = OwLore(active_layers=2, rank=4, embeddings="low-rank", scores="uniform")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_no_step_adds_in_an_order_of_its_own(family: str) -> None:
    """But for the gradient of the rows whose labels count, each of which is added to once."""
    with AtomicAdds() as adds:
        rehearse(Workload(config(family), METHOD, batch_size=ROWS, seq_len=TOKENS, dtype="fp32"))
    assert adds.seen <= {("index_add", (ROWS * TOKENS, WIDTH))}


def test_an_atomic_addition_would_be_seen() -> None:
    """Negative control: rows of equal places, and a float running sum; one place for each row is none."""
    total, place = torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64)
    with AtomicAdds() as adds:
        total.index_add_(0, place, torch.ones(4, 2))
        total.cumsum(0)
        place.cumsum(0)
        total.scatter_add_(1, place[:3].unsqueeze(1), torch.ones(3, 1))
    assert adds.seen == {("index_add_", (3, 2)), ("cumsum", (3, 2))}
