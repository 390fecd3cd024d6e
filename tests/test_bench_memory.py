"""The memory benchmark: real steps take what was planned, peers' too; what cannot run says why."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from plan.small_runs import config

from bench import memory, memory_runs
from bench.memory_runs import PEERS, Peer, measured_peer, planned_peer
from bench.plots import parts_of
from bench.step_contestants import EmptyAdamW
from lisa_kernels import OwLore
from lisa_kernels.plan.rehearsal import Workload

PACKAGES = {"peft-lora": "peft", "peft-qlora": "peft", "galore-torch": "galore_torch", "badam": "badam"}


def workload(**changes: Any) -> Workload:
    settings = {"batch_size": 2, "seq_len": 16, "dtype": "fp32", **changes}
    # 64 wide: what 4-bit weights come in blocks of.
    method = OwLore(active_layers=2, rank=4, scores="uniform", embeddings="frozen")
    return Workload(config("llama", hidden_size=64), method, **settings)


@pytest.mark.parametrize(
    "checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["checkpointing", "plain"]
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "badam" else name for name in PEERS]
)
def test_a_peer_takes_what_was_planned(name: str, checkpointing: bool) -> None:
    """The same tracker follows a peer's step with and without values to the same byte."""
    if name in PACKAGES and find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    given = workload(gradient_checkpointing=checkpointing)
    assert planned_peer(PEERS[name], given).phases() == measured_peer(PEERS[name], given).phases()


def test_a_peer_that_holds_more_is_seen() -> None:
    """Negative control: another buffer in the real run breaks the equality."""

    def start(model: Any, case: Any) -> Any:
        trainee = PEERS["torch-full"].start(model, case)
        device = next(model.parameters()).device
        if device.type == "cpu":
            model.register_buffer("more", torch.zeros(1), persistent=False)
        return trainee

    peer = Peer("more", start)
    assert planned_peer(peer, workload()).peak_bytes + 4 == measured_peer(peer, workload()).peak_bytes


def test_the_stand_in_for_fused_adamw_holds_what_it_does() -> None:
    """Two moments and a step for each parameter that has a gradient."""
    given = torch.nn.Parameter(torch.zeros(3, 5)), torch.nn.Parameter(torch.zeros(2))
    given[0].grad = torch.ones(3, 5)
    ours, theirs = EmptyAdamW(given), torch.optim.AdamW(given, fused=True)
    ours.step()
    theirs.step()

    def sizes(optimizer: torch.optim.Optimizer) -> list[int]:
        return sorted(value.numel() for state in optimizer.state.values() for value in state.values())

    assert sizes(ours) == sizes(theirs)


@pytest.mark.slow
def test_the_command_shows_and_records_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table, JSON, a picture and rows; planned equals measured."""
    monkeypatch.setattr("bench.rows.RESULTS", tmp_path)
    picture = tmp_path / "memory.png"
    words = ["--models", "tiny", "--methods", "owlore-frozen,full", "--seq-len", "16", "--json", "--record"]
    assert memory.main([*words, "--plot", str(picture)]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["name"] for row in rows] == ["owlore-frozen", "full"]
    assert all(row["planned_bytes"] == row["measured_bytes"] for row in rows)
    assert all(sum(parts_of(row["split"]).values()) == row["planned_bytes"] for row in rows)
    assert picture.stat().st_size > 0
    assert len((tmp_path / "memory.jsonl").read_text().splitlines()) == 2


def test_a_peer_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row holds the reason, and the others run on."""

    def start(model: Any, case: Any) -> Any:
        raise RuntimeError("wants a GPU")

    monkeypatch.setitem(memory_runs.PEERS, "badam", Peer("badam", start))
    arguments = ["--models", "tiny", "--methods", "badam", "--seq-len", "16"]
    assert memory.main(arguments) == 0
    row = memory._row("badam", "badam", "tiny", workload())
    assert (row.planned_bytes, row.reason) == (None, "RuntimeError: wants a GPU")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "tniy"], "'tniy'.*tiny"),
        (["--methods", "owlore-forzen"], "'owlore-forzen'.*owlore-frozen"),
        (["--batch", "0"], "--batch 0"),
    ],
    ids=["model", "method", "batch"],
)
def test_mistakes_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence each, before anything is planned."""
    assert memory.main(words) == 2
    assert re.search(message, capsys.readouterr().err)
