"""`torchrun lisa-kernels finetune --shard`: processes that share the weights out end as ones that have all of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from train.small_run import arguments, summary, write_text
from train.test_ranks import command, refusals, weights

from lisa_kernels.errors import InputError
from lisa_kernels.plan.command import plan_run
from lisa_kernels.report import read_run
from lisa_kernels.report.memory import most_held, planned
from lisa_kernels.train.checkpoint import SHARDS
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.sharded import check_disk, check_shard
from lisa_kernels.train.trainer import _shared_out

# A switch before the checkpoint and one after; held-out batches that two ranks share unevenly.
USUAL = ("--steps", "8", "--batch-size", "4", "--save-every", "4", "--period", "3", "--device", "cpu")
LOSSES = ("train_loss_first", "train_loss_last", "eval_loss_before", "eval_loss_after", "layer_history")


class OneRank:
    """Stands for ranks in what they say to each other: all say the same as this one, but for `others`."""

    def __init__(self, rank: int = 0, count: int = 2, others: object = None) -> None:
        self.rank, self.count, self._others = rank, count, others

    def tell(self, value: object) -> list[object]:
        return [value] + [value if self._others is None else self._others] * (self.count - 1)


def run(ranks: int, data: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(ranks, arguments(data, output, *USUAL, *more, method="owlore")),
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def replicas(text: Path) -> Path:
    """Train on two ranks that have all weights each."""
    output = text.parent / "replicas"
    done = run(2, text, output)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def shards(text: Path) -> Path:
    """Train on two ranks that share the weights out."""
    output = text.parent / "shards"
    done = run(2, text, output, "--shard")
    assert done.returncode == 0, done.stderr
    return output


def unequal(one: Path, other: Path) -> list[str]:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return [name for name, tensor in ours.items() if not tensor.equal(theirs[name])]


@pytest.mark.slow
def test_shards_end_as_replicas_do(replicas: Path, shards: Path) -> None:
    """Bit for bit: an ordinary model, losses of all rows, the layers drawn; and one folder, of one writer."""
    assert unequal(shards, replicas) == []
    assert [summary(shards)[name] for name in LOSSES] == [summary(replicas)[name] for name in LOSSES]
    assert {path.name for path in shards.iterdir()} == {path.name for path in replicas.iterdir()}
    checkpoint = {path.name for path in (shards / "checkpoint-4").iterdir()}
    assert SHARDS in checkpoint
    assert "model.safetensors" not in checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "more"), [(2, ["--shard"]), (2, []), (1, [])], ids=["shards", "replicas", "alone"])
def test_any_number_of_processes_goes_on(ranks: int, more: list[str], text: Path, shards: Path, tmp_path: Path) -> None:
    """From what two with shards have written: with as many the end is the same to the bit, alone to rounding."""
    output = tmp_path / "resumed"
    shutil.copytree(shards, output)
    shutil.rmtree(output / "checkpoint-8")
    for name in ("model.safetensors", "summary.json"):
        (output / name).unlink()
    done = run(ranks, text, output, *more, "--resume")
    assert done.returncode == 0, done.stderr
    assert summary(output)["layer_history"] == summary(shards)["layer_history"]
    if ranks == 2:
        assert unequal(output, shards) == []
    assert summary(output)["eval_loss_after"] == pytest.approx(summary(shards)["eval_loss_after"], rel=1e-4)


@pytest.mark.slow
def test_shards_are_planned_as_they_run(text: Path, replicas: Path, shards: Path) -> None:
    """By the plan that a process without others makes; what tensors hold is as it says, and less than replicas do."""
    # Of each process.
    rows = {"batch_size": 2, "seq_len": 32, "dtype": "fp32", "method": "owlore", "rank": 16, "period": 3}
    options = FineTuneOptions("preset:tiny", str(text), shards, device="cpu", shard=True, **rows)  # type: ignore[arg-type]
    wanted = plan_run(options, ranks=2, travels=True)
    assert summary(shards)["peak_bytes_planned"] == wanted.peak_bytes < summary(replicas)["peak_bytes_planned"]
    ran, other = read_run(shards), read_run(replicas)
    assert planned(ran)["travel"] == wanted.travel
    assert wanted.travel[0] == planned(other)["travel"][0]
    assert "gathered" in wanted.travel[1]
    assert sum(most_held(ran).values()) == pytest.approx(sum(wanted.held_bytes.values()), rel=1e-3)
    assert sum(most_held(ran).values()) < 0.7 * sum(most_held(other).values())


@pytest.mark.slow
def test_replicas_checkpoints_are_refused(text: Path, replicas: Path, tmp_path: Path) -> None:
    """By each process, in one sentence that says what to do."""
    output = tmp_path / "resumed"
    shutil.copytree(replicas, output)
    shutil.rmtree(output / "checkpoint-8")
    for said in refusals(arguments(text, output, *USUAL, "--shard", "--resume", method="owlore")):
        assert said.count("resume without --shard") == 1


@pytest.mark.parametrize(
    ("more", "alone", "sentence"),
    [
        ({}, True, "this is a single one; start them by torchrun"),
        ({"dtype": "fp16"}, False, "use --dtype bf16 or fp32"),
        ({"samples": 2}, False, "leave it out"),
    ],
    ids=["alone", "fp16", "samples"],
)
def test_what_shards_cannot_do_is_said(more: dict[str, object], alone: bool, sentence: str, tmp_path: Path) -> None:
    options = FineTuneOptions("preset:tiny", "text.txt", tmp_path, shard=True, **more)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=sentence):
        check_shard(options, None if alone else OneRank())  # type: ignore[arg-type]


def test_each_rank_has_to_see_the_folder(tmp_path: Path) -> None:
    options = FineTuneOptions("preset:tiny", "text.txt", tmp_path, shard=True)
    (tmp_path / "run.json").write_text("{}")
    check_disk(options, OneRank())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="another disk for rank 1"):
        check_disk(options, OneRank(others="{ }"))  # type: ignore[arg-type]


@pytest.mark.parametrize("batches", range(8))
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_ranks_take_as_many_held_out_batches(batches: int, ranks: int) -> None:
    """Each counts once, and those that a rank takes beside its own count for nothing."""
    taken = [list(_shared_out(range(batches), OneRank(rank, ranks))) for rank in range(ranks)]  # type: ignore[arg-type]
    assert {len(each) for each in taken} == {-(-batches // ranks)}
    assert sorted(batch for each in taken for batch, counts in each if counts) == list(range(batches))
    assert all(batch is not None for each in taken for batch, _ in each)
