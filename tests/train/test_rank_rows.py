"""Ranks share the rows of each step: together they take those of one process, in its order."""

from __future__ import annotations

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from lisa_kernels.errors import InputError
from lisa_kernels.train.rank_rows import BLANK, RankBatches, RankLoader, RowsOrBlank, share_of_rank

SEED = 5


def one_process(rows: int, batch_size: int, epoch: int) -> list[list[int]]:
    """Return the micro-batches of a pass as the Trainer of one process takes them."""
    sampler = SeedableRandomSampler(range(rows), generator=torch.Generator(), data_seed=SEED)
    sampler.set_epoch(epoch)
    order = list(sampler)
    return [order[start : start + batch_size] for start in range(0, rows, batch_size)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("rows", [12, 13, 17])
@pytest.mark.parametrize("epoch", [0, 2])
def test_all_ranks_together_take_the_rows_of_one_process(ranks: int, rows: int, epoch: int) -> None:
    """Every micro-batch of 6 rows, shared; of the last, short one some may have less or nothing."""
    parts = [RankBatches(rows, 6 // ranks, SEED, rank, ranks) for rank in range(ranks)]
    for part in parts:
        part.set_epoch(epoch)
    each = [list(part) for part in parts]
    assert all(len(batches) == len(part) == -(-rows // 6) for batches, part in zip(each, parts))
    joined = [[row for rank in step for row in rank if row != BLANK] for step in zip(*each)]
    assert joined == one_process(rows, 6, epoch)


def test_passes_follow_each_other() -> None:
    """The next one has the next order, told or not."""
    batches = RankBatches(8, 2, SEED, 1, 2)
    first, second = list(batches), list(batches)
    assert first != second
    batches.set_epoch(0)
    assert list(batches) == first


@pytest.mark.parametrize(
    ("given", "share"), [((4, 1, 2), (2, 1)), ((3, 4, 2), (3, 2)), ((2, 8, 4), (2, 2)), ((6, 2, 3), (2, 2))]
)
def test_a_step_keeps_its_rows(given: tuple[int, int, int], share: tuple[int, int]) -> None:
    """Micro-batches become smaller or, where they cannot, fewer."""
    assert share_of_rank(*given) == share


def test_a_step_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(InputError, match=r"3 micro-batches of 5 rows, which 2 processes.*a multiple of 2"):
        share_of_rank(5, 3, 2)


def test_a_blank_row_has_no_label() -> None:
    """It is as long as a real one, and the loader gives it to a rank that has no row left."""
    rows = [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}]
    blank = RowsOrBlank(rows)[BLANK]
    assert blank["input_ids"].tolist() == [1, 2]
    assert blank["labels"].tolist() == [-100, -100]
    loader = RankLoader(rows, RankBatches(1, 1, SEED, 1, 2), lambda some: some[0], False)
    assert [row["labels"].tolist() for row in loader] == [[-100, -100]]
