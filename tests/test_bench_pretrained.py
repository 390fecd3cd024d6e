"""The comparison on a pretrained model: a row of a real run, what is run and what is not, the table's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import pretrained, pretrained_cost, rows
from bench.choice_table import README, choice_table
from bench.pretrained_contestants import CONTESTANTS, Contestant
from bench.pretrained_table import (
    BEFORE,
    FULL,
    PEER,
    grid_table,
    paired,
    steps_to_quality,
    table,
    tables,
)
from bench.pretrained_tasks import Size, Task, spread
from bench.readme import README as PAGE
from bench.readme import put
from lisa_kernels.evaluate.likelihood import Scored
from lisa_kernels.train.models import load_model
from lisa_kernels.train.tokenize import TokenizedData

SIZE = Size(steps=12, step_tokens=8, test_rows=2, curve_rows=1, curve_every=4)
ASKED = [Scored((5, 6, 7, 8), (2, 3)), Scored((9, 8, 7), (1, 2))]


def task() -> Task:
    ids = torch.arange(3, 11)
    return Task("counting", TokenizedData([{"input_ids": ids, "labels": ids.clone()}]), ASKED, ASKED[:1], 0)


def row(contestant: str, seed: int, loss: float, lr: float = 1e-3, **others: Any) -> dict[str, Any]:
    return {
        "task": "counting", "contestant": contestant, "lr": lr, "seed": seed, **SIZE.key(), "answer_loss": loss,
        "known_loss": 3.0, "cpu_seconds": 6.0, "curve": [], **others,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    return tmp_path / "pretrained.jsonl"


@pytest.mark.parametrize("name", [FULL, 'LoRA(rank=16, embeddings="low-rank")'])
def test_a_run_learns_and_says_what_it_cost(name: str) -> None:
    contestant = next(each for each in CONTESTANTS if each.name == name)
    before = pretrained.run(contestant, 0.0, 0, task(), SIZE, base="preset:tiny")
    after = pretrained.run(contestant, 1e-3, 0, task(), SIZE, base="preset:tiny")
    assert after["answer_loss"] < before["answer_loss"]
    assert sum(after["nats"]) == pytest.approx(4 * after["answer_loss"], abs=0.01)
    assert [at for at, _, _ in after["curve"]] == [4, 8, 12]
    assert after["curve"][-1][2] == pytest.approx(after["nats"][0] / 2, abs=1e-3)
    assert after.keys() >= {*SIZE.key(), "known_loss", "cpu_seconds"}


def test_rows_that_exist_are_not_run_again(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the grid on a seed that is not counted, then the counted seeds at its best rate."""
    ran: list[tuple[float, int]] = []

    def run(contestant: Contestant, lr: float, seed: int, task: Task, size: Size) -> dict[str, Any]:
        ran.append((lr, seed))
        return {**row(contestant.name, seed, loss=abs(lr - 2e-3)), "lr": lr, "curve": []}

    monkeypatch.setattr(pretrained, "run", run)
    contestant = Contestant("one", CONTESTANTS[0].start, (1e-3, 2e-3))
    assert pretrained.tuned_rates(contestant, "counting", SIZE) == ()
    for _ in range(2):
        pretrained.measure(contestant, contestant.rates, (pretrained.GRID_SEED,), task, SIZE, "counting")
    assert ran == [(1e-3, pretrained.GRID_SEED), (2e-3, pretrained.GRID_SEED)]
    assert pretrained.tuned_rates(contestant, "counting", SIZE) == (2e-3,)
    assert len(results.read_text().splitlines()) == 2
    assert json.loads(results.read_text().splitlines()[0])["commit"]


def test_the_table_compares_seed_by_seed() -> None:
    """Each with full fine-tuning of its own seed; the seed of the grid does not count, nor do other rates."""
    found = [
        *[row(FULL, seed, loss) for seed, loss in enumerate((1.0, 2.0))],
        *[row("ours", seed, loss) for seed, loss in enumerate((0.9, 1.9))],
        row("ours", 2, 0.5, lr=9e-3), row("ours", 100, 0.1), row(BEFORE, 0, 4.0, lr=0.0),
    ]  # fmt: skip
    text = table(found, [FULL, "ours"], (0, 1, 2))
    first, second, last = text.splitlines()[2:]
    assert first.startswith("| ours | 1.4000 | -7.5% ± 3.5% | 2 | 0.001 | - | - | - | never | never | 3.000 |")
    assert second.startswith(f"| {FULL} | 1.5000 |")
    assert last.startswith(f"| {BEFORE} | 4.0000 |")
    assert paired(found[2:4], found[:2]) == pytest.approx((-0.075, 0.0353553), rel=1e-4)


def test_who_was_taught_other_rows_is_not_compared() -> None:
    """Rows of before checksums were kept are taken at their word."""
    ours, peer = row("ours", 0, 1.0, taught_crc32=7), row("peer", 0, 2.0, taught_crc32=8)
    assert paired([ours], [row("peer", 0, 2.0)]) is not None
    with pytest.raises(ValueError, match="ours and peer were taught different rows on seed 0"):
        paired([ours], [peer])


def test_steps_to_quality_are_read_from_the_curves() -> None:
    """Of each seed beside the peer of that seed; a method that never gets there has none."""
    peers = [row("peer", seed, 0.8, curve=[[4, 10.0, 1.0], [8, 20.0, 0.8]]) for seed in (0, 1)]
    fast = row("fast", 0, 0.7, curve=[[2, 8.0, 0.9], [6, 15.0, 0.7], [8, 22.0, 0.6]])
    slow = row("slow", 1, 0.9, curve=[[4, 8.0, 0.9], [8, 15.0, 0.85]])
    assert steps_to_quality([fast], peers) == pytest.approx(4 / 8)
    assert steps_to_quality(peers, peers) == 1.0
    assert steps_to_quality([slow], peers) is None
    assert steps_to_quality([row("elsewhere", 7, 0.7, curve=fast["curve"])], peers) is None


def test_costs_make_steps_comparable() -> None:
    """Time and operations to a peer's loss are the share of its steps by what a step costs beside the peer's."""
    curve = [[6, 3.0, 0.9], [12, 6.0, 0.8]]
    found = [row(FULL, 0, 1.0, curve=curve), row(PEER, 0, 0.8, curve=curve), row("ours", 0, 0.7, curve=[[6, 1.0, 0.8]])]
    costs = [
        {"contestant": name, "operations": 1e9 * many, "cpu_time_over_peer": time, "peak_bytes_over_weights": 3e6}
        for name, many, time in ((FULL, 30, 2.0), (PEER, 20, 1.0), ("ours", 15, 0.8))
    ]
    cells = [line.split(" | ") for line in table(found, [FULL, PEER, "ours"], (0,), costs).splitlines()]
    assert cells[2][0] == "| ours"
    assert cells[2][5:10] == ["15", "0.80×", "3 MB", "0.40× / 0.38×", "0.20× / 0.25×"]


def test_the_grids_table_has_everyones_best_on_that_seed() -> None:
    found = [
        row(FULL, 100, 1.0), row("ours", 100, 0.9, lr=2e-3), row("ours", 100, 0.8), row("ours", 0, 0.1),
        row(PEER, 100, 1.6),
    ]  # fmt: skip
    lines = grid_table(found, [FULL, PEER, "ours"], 100).splitlines()[2:]
    assert lines[0] == "| ours | 0.8000 | -20.0% | -50.0% | 0.001 | 2 |"
    assert lines[1] == f"| {FULL} | 1.0000 |  | -37.5% | 0.001 | 1 |"
    assert len(lines) == 3


def test_what_a_step_costs_is_counted_in_real_steps() -> None:
    """Of all weights six operations a weight of a product and token; LoRA holds no gradients and moments of them."""
    names = (FULL, 'LoRA(rank=16, embeddings="low-rank")')
    full, lora = (
        pretrained_cost.counted(next(each for each in CONTESTANTS if each.name == name), task(), base="preset:tiny")
        for name in names
    )
    model = load_model("preset:tiny", torch.float32, 0)
    weights = sum(param.numel() for param in model.parameters() if param.dim() == 2)
    weights -= model.get_input_embeddings().weight.numel()
    tokens = 8
    assert 0.9 < full["operations"] / (6 * weights * tokens) < 1.1
    assert lora["peak_bytes_over_weights"] < full["peak_bytes_over_weights"] / 2


def test_the_pages_show_the_recorded_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Writing both tables anew changes nothing: no figure was typed, and none is older than its row."""
    monkeypatch.undo()
    names = [contestant.name for contestant in CONTESTANTS]
    made = tables("gsm8k", names, pretrained.SEEDS, Size())
    shown = {**{name: (text, PAGE) for name, text in made.items()}, "choice": (choice_table(), README)}
    assert len(shown) == 5
    for name, (text, page) in shown.items():
        copy = tmp_path / "page.md"
        copy.write_text(page.read_text())
        assert put(name, text, copy)
        assert copy.read_text() == page.read_text()


def test_rows_are_spread_over_all() -> None:
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread([1, 2], 5) == [1, 2]
