"""What ranks send is counted where collectives begin, by a ring's share, whoever begins them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import on_ranks
from rich.console import Console
from torch import nn

from bench import ranks
from bench.rank_contestants import CONTESTANTS, Wire
from bench.ranks import Row, print_bytes, print_speed

ROW = Row("OwLore", 1, 0.0, 141.6e6, 1.0, 0.9, 0.0, 100.0)


def sent(rank: int) -> dict[str, float]:
    found = {}

    def count(name: str, work: Any) -> None:
        with Wire() as wire:
            work()
        found[name] = wire.sent

    count("sum", lambda: dist.all_reduce(torch.ones(100)))
    count("broadcast", lambda: dist.broadcast(torch.ones(100), 0))
    count("gather", lambda: dist.all_gather_into_tensor(torch.empty(200), torch.ones(100)))
    count("scatter", lambda: dist.reduce_scatter_tensor(torch.empty(100), torch.ones(200)))
    model = nn.parallel.DistributedDataParallel(nn.Linear(10, 10))
    count("DDP", lambda: model(torch.ones(1, 10)).sum().backward())
    return found


def test_each_kind_is_counted() -> None:
    """Of two ranks a sum sends all of it, a gather and a scatter half; DDP's own sums are seen in the backward."""
    for each in on_ranks(sent):
        assert each == {"sum": 400, "broadcast": 400, "gather": 400, "scatter": 400, "DDP": 440}


def test_two_ranks_stand_beside_one(capsys: pytest.CaptureFixture[str]) -> None:
    """By tokens a second, and by the CPU time that each of them takes."""
    console = Console(width=200)
    two = Row("OwLore", 2, 5e6, 141.6e6, 1.25, 1.0, 0.2, 160.0, "1gbit", (0.1, 0.2))
    print_speed([ROW, two], console)
    print_bytes([two], console)
    said = capsys.readouterr().out
    assert "2 ranks have 1.60 times the tokens/s of one; by CPU time of each process 1.80 times" in said
    assert "0.100-0.200" in said
    assert "5.000" in said


def test_a_contestant_is_chosen_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not known is told before a process starts."""
    asked: list[list[str]] = []
    monkeypatch.setattr(ranks, "measure", lambda names, *_: asked.append(list(names)) or [])
    assert ranks.main(["bytes", "--json", "--only", "DDP, full"]) == 0
    assert ranks.main(["bytes", "--json"]) == 0
    assert ranks.main(["bytes", "--only", "DDP"]) == 2
    assert asked == [["DDP, full"], list(CONTESTANTS)]
