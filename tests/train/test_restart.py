"""torchrun --max-restarts: whichever rank is killed, and wherever, the end is that of a run that was left alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from train.killed_rank import DEATH
from train.small_run import arguments, summary, write_text

from lisa_kernels.train import restart, run_folder
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.run_folder import open_run, start_run

SCRIPT = Path(__file__).with_name("killed_rank.py")
STEPS = 18
# Rank, place, which call of it in that start, and how many seconds later.
Trap = tuple[int, str, int, float]
PLACES: list[Trap] = [
    (0, "begin", 1, 0.0), (1, "backward", 2, 0.0), (0, "basis", 3, 0.0), (1, "step", 4, 0.0), (0, "switch", 2, 0.0),
    (1, "save", 1, 0.0), (0, "files", 1, 0.0), (0, "last save", 1, 0.0),
]  # fmt: skip
# Where processes share the weights out each writes its rows, in a folder that is put in its place, and reads them.
SHARD_PLACES: list[Trap] = [
    (1, "backward", 2, 0.0), (0, "step", 4, 0.0), (1, "switch", 2, 0.0), (1, "rows", 1, 0.0), (0, "rows", 2, 0.01),
    (0, "rows in place", 1, 0.0), (0, "files", 1, 0.0), (1, "rows read", 1, 0.0), (1, "whole weights", 1, 0.0),
    (0, "last save", 1, 0.0),
]  # fmt: skip


def random_moments(seed: int, count: int = 4) -> list[Trap]:
    """Return moments up to some 0.2 s after a step of a start."""
    draw = random.Random(seed)
    return [(draw.randrange(2), "step", draw.randint(3, 4), draw.random() * 0.2 + 1e-3) for _ in range(count)]


def start(data: Path, output: Path, traps: list[Trap], *more: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [f"--nproc-per-node={ranks}", f"--max-restarts={len(traps)}", "--standalone"]
    flags = ["--steps", str(STEPS), "--batch-size", "4", "--save-every", "2", "--period", "3", "--device", "cpu", *more]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launcher, str(SCRIPT), json.dumps(traps),
         *arguments(data, output, *flags, method="owlore")],
        capture_output=True, text=True, timeout=1800,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("restart"))


@pytest.fixture(scope="module", params=[[], ["--shard"]], ids=["replicas", "shards"])
def more(request: pytest.FixtureRequest) -> list[str]:
    """Whether each rank has all weights, or its rows of them."""
    flags: list[str] = request.param
    return flags


@pytest.fixture(scope="module")
def whole(data: Path, more: list[str]) -> Path:
    """Run on two ranks and leave them alone."""
    output = data.parent / "-".join(["whole", *more])
    run = start(data, output, [], *more)
    assert run.returncode == 0, run.stderr
    return output


@pytest.mark.slow
@pytest.mark.parametrize("at_random", [False, True], ids=["places", "random moments"])
def test_kills_change_no_bit(at_random: bool, data: Path, more: list[str], whole: Path, tmp_path: Path) -> None:
    """Each start of one launch is killed, in one rank at another moment; the other says one sentence, and ends."""
    traps = random_moments(0) if at_random else SHARD_PLACES if more else PLACES
    run = start(data, tmp_path / "killed", traps, *more)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count(DEATH) == len(traps)
    theirs = load_file(whole / "model.safetensors")
    for name, tensor in load_file(tmp_path / "killed" / "model.safetensors").items():
        assert tensor.equal(theirs[name]), name
    for name in ("layer_visits", "layer_history", "eval_loss_before", "eval_loss_after", "train_loss_last"):
        assert summary(tmp_path / "killed")[name] == summary(whole)[name]


def options_of(folder: Path, **more: bool) -> FineTuneOptions:
    return FineTuneOptions("preset:tiny", "text.txt", folder / "run", method="lisa", **more)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwritten"])
def test_a_launcher_goes_on_with_its_own_run(overwrite: bool, tmp_path: Path) -> None:
    """Whether it began in a new folder or in that of an older run; the run of another launch is no one's to take."""
    options = options_of(tmp_path, overwrite=overwrite)
    start_run(options_of(tmp_path), {restart.LAUNCHERS: ["a:1"]})
    assert restart.resumed_by_launcher(options, ["a:2"], None) is options
    assert restart.resumed_by_launcher(options, [], None) is options
    resumed = restart.resumed_by_launcher(options, ["a:1"], None)
    assert resumed.resume
    assert not resumed.overwrite
    assert open_run(resumed)[0][restart.LAUNCHERS] == ["a:1"]


def test_machines_that_come_later_may_go_on_alone(tmp_path: Path) -> None:
    """Of two launchers the second came after a restart, and the first went for good."""
    options = options_of(tmp_path)
    assert restart.resumed_by_launcher(options, ["a:1"], None) is options
    start_run(options, {restart.LAUNCHERS: ["a:1"]})
    assert restart.resumed_by_launcher(options, ["a:1", "b:2"], None).resume
    assert restart.resumed_by_launcher(options, ["b:2"], None).resume


def test_what_a_killed_start_left_is_no_run(tmp_path: Path) -> None:
    """Neither the rehearsal of saving nor half of a run.json keeps the next start from beginning, and both go."""
    options = options_of(tmp_path)
    (options.output / ".rehearsal-abc").mkdir(parents=True)
    (options.output / ".run.json.partial").write_text("{")
    assert open_run(options) == ({}, None)
    start_run(options, {})
    assert [path.name for path in options.output.iterdir()] == ["run.json"]


def test_an_overwritten_run_is_there_until_the_new_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while its files go leaves a folder that may be overwritten again."""
    options = options_of(tmp_path, overwrite=True)
    start_run(options_of(tmp_path), {"old": True})
    (options.output / "checkpoint-3").mkdir()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            start_run(options, {})
    assert [path.name for path in options.output.iterdir()] == ["run.json"]
    start_run(options, {"new": True})
    assert json.loads((options.output / "run.json").read_text())["new"]
