"""A checkpoint that one machine has is read on all of them, and stays what it is."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from distributed.ranks import on_ranks

from lisa_kernels import InputError
from lisa_kernels.distributed import ranks_of
from lisa_kernels.train import lent_checkpoint
from lisa_kernels.train.lent_checkpoint import on_every_machine

FILES = {"model.safetensors": bytes(range(256)) * 5, "trainer_state.json": b"{}", "empty": b""}
CHECKPOINT = Path("run/checkpoint-4")


def lent(rank: int, disks: str) -> dict[str, object]:
    """Return what a rank whose disk is its own finds, and what it has in the end."""
    os.chdir(Path(disks) / str(min(rank, 1)))
    # Ranks 1 and 2 are of one machine.
    platform.node = lambda: str(min(rank, 1))
    lent_checkpoint.PORTION = 100
    with on_every_machine(CHECKPOINT, ranks_of("auto")) as checkpoint:
        assert checkpoint is not None
        found = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with on_every_machine(None, ranks_of("auto")) as none:
        pass
    return {"found": found, "own": checkpoint == CHECKPOINT, "none": none, "left": sorted(os.listdir("run"))}


def broken(rank: int, disks: str) -> str:
    """Return what is said where the other machine's disk takes nothing."""
    os.chdir(Path(disks) / str(rank))
    if rank:
        Path("run").rmdir()
        Path("run").write_text("a file")
    try:
        with on_every_machine(CHECKPOINT, ranks_of("auto")):
            return ""
    except (InputError, OSError) as error:
        return str(error)


@pytest.fixture
def disks(tmp_path: Path) -> str:
    """Two disks, of which the first has the checkpoint."""
    (tmp_path / "0" / CHECKPOINT).mkdir(parents=True)
    (tmp_path / "1" / "run").mkdir(parents=True)
    for name, held in FILES.items():
        (tmp_path / "0" / CHECKPOINT / name).write_bytes(held)
    return str(tmp_path)


def test_rank_0_sends_it_where_it_is_not(disks: str) -> None:
    """Whole, once to each machine, and nothing is left of the copy."""
    own, *others = on_ranks(lent, disks, count=3)
    assert own["own"]
    assert own["left"] == ["checkpoint-4"]
    for each in others:
        assert {name: each["found"].get(name, b"") for name in FILES} == FILES
        assert not each["own"]
        assert each["left"] == []
    assert [each["none"] for each in (own, *others)] == [None] * 3


def test_a_disk_that_takes_nothing_stops_all(disks: str) -> None:
    """With its reason, on every rank."""
    first, second = on_ranks(broken, disks)
    assert first.startswith("rank 1 stopped: ")
    assert "run" in second
