"""Which rows of a tensor a rank holds, what is known of them together, and which rows cannot be stepped."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed.ranks import on_ranks
from distributed.test_ranks import said
from lisa_kernels.distributed.shards import (
    check_cut,
    check_placement,
    first_element,
    first_row,
    gathered,
    group_of_shards,
    is_sharded,
    local,
    rows_like,
    shard_like,
    total_norm,
    whole,
)


def everything(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    table = torch.arange(15.0).view(5, 3)
    shard = distribute_tensor(table, mesh, [Shard(0)])
    one_row = distribute_tensor(table[:1].clone(), mesh, [Shard(0)])
    twice = shard_like(shard, 2 * local(shard), shard.shape)
    return {
        "known": (is_sharded(shard), is_sharded(table)),
        "rows": (local(shard).shape[0], first_row(shard), first_element(shard)),
        "one row": (local(one_row).shape[0], first_row(one_row)),
        "plain": (local(table) is table, first_row(table), whole(table) is table),
        "whole": whole(shard).equal(table),
        "like": whole(twice).equal(2 * table),
        "cut out": rows_like(shard, table).equal(local(shard)) and rows_like(shard, shard).equal(local(shard)),
        "gathered": gathered(torch.tensor([1.0 + rank]), group_of_shards(shard)).tolist(),
        "norm": float(total_norm([shard, torch.tensor([3.0, 4.0])])),
        "cut": said(lambda: check_cut("w", shard, 4, "fours", "use 1 rank.")),
        "not cut": said(lambda: check_cut("w", shard, 3, "threes", "use 1 rank.")),
        "never cut": said(lambda: check_cut("w", one_row, 256, "blocks", "use 1 rank.")),
        "replica": said(lambda: check_placement("w", distribute_tensor(table, mesh, [Replicate()]))),
        "columns": said(lambda: check_placement("w", distribute_tensor(table, mesh, [Shard(1)]))),
        "placed": said(lambda: check_placement("w", shard)),
    }


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return on_ranks(everything)


def test_ranks_hold_consecutive_rows_the_last_ones_fewer(found: list[dict[str, Any]]) -> None:
    assert [each["rows"] for each in found] == [(3, 0, 0), (2, 3, 9)]
    assert [each["one row"] for each in found] == [(1, 0), (0, 1)]
    for each in found:
        assert each["known"] == (True, False)
        assert each["plain"] == (True, 0, True)


def test_rows_make_the_whole_and_are_cut_out_of_it(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert all(each[name] for name in ("whole", "like", "cut out"))
        assert each["gathered"] == [[1.0], [2.0]]


def test_a_norm_is_of_all_rows_and_of_whole_tensors_once(found: list[dict[str, Any]]) -> None:
    expected = float(torch.cat([torch.arange(15.0), torch.tensor([3.0, 4.0])]).norm())
    for each in found:
        assert each["norm"] == pytest.approx(expected, rel=1e-6)
        assert each["norm"] == found[0]["norm"]


SENTENCES = {
    "cut": r"w \[5, 3\] is shared out in 3 rows a rank, 9 elements, and fours of 4 would be cut; use 1 rank\.",
    "replica": "rows shared out over one dimension are wanted",
    "columns": "rows shared out over one dimension are wanted",
}


@pytest.mark.parametrize("attempt", ["cut", "not cut", "never cut", "replica", "columns", "placed"])
def test_what_cannot_be_stepped_by_rows_is_refused(attempt: str, found: list[dict[str, Any]]) -> None:
    """On every rank alike, those without rows included; rows that end where blocks do pass."""
    for each in found:
        assert bool(each[attempt]) == (attempt in SENTENCES)
        assert re.search(SENTENCES.get(attempt, ""), each[attempt])
        assert "\n" not in each[attempt]


def test_plain_tensors_need_no_ranks() -> None:
    tensor: Tensor = torch.tensor([3.0, 4.0])
    assert float(total_norm([tensor])) == 5.0
    assert not is_sharded(tensor)
