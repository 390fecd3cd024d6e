"""`torchrun lisa-kernels finetune`: two processes train what one trains, stop and go on together, and one writes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train.small_run import arguments, summary, write_text

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
# Two passes over the rows, the last step of each short.
USUAL = ("--steps", "12", "--batch-size", "16", "--accumulate", "2", "--save-every", "4", "--device", "cpu")


def command(ranks: int, argv: list[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "lisa_kernels.cli", *argv]


def run(ranks: int, argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(ranks, argv), capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    theirs = weights(other)
    return all(torch.equal(tensor, theirs[name]) for name, tensor in weights(one).items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    return write_text(folder)


@pytest.fixture(scope="module")
def whole(folder: Path, text: Path) -> dict[str, Any]:
    """Run the same on one process and on two."""
    found: dict[str, Any] = {}
    for method in ("lisa", "owlore"):
        for ranks in (1, 2):
            output = folder / f"{method}-{ranks}"
            found[f"{method} {ranks}"] = run(ranks, arguments(text, output, *USUAL, "--json", method=method))
            assert found[f"{method} {ranks}"].returncode == 0, found[f"{method} {ranks}"].stderr
    return found


@pytest.mark.parametrize("method", ["lisa", "owlore"])
def test_two_processes_train_what_one_trains(method: str, folder: Path, whole: dict[str, Any]) -> None:
    """The same rows in each step, the same layers, and losses that differ by rounding."""
    one, two = summary(folder / f"{method}-1"), summary(folder / f"{method}-2")
    for name in ("layer_history", "layer_visits", "steps", "lr", "warmup_steps"):
        assert one[name] == two[name]
    for name in ("train_loss_first", "train_loss_last", "eval_loss_before", "eval_loss_after"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name


def test_one_of_them_speaks_and_writes(folder: Path, whole: dict[str, Any]) -> None:
    """One summary on the standard output, one progress, and the files of one run."""
    two = whole["lisa 2"]
    assert json.loads(two.stdout)["method"] == "lisa"
    assert two.stderr.count("held-out loss before") == 1
    assert two.stderr.count("step 12/12") == 1
    kinds = [sorted(path.name for path in (folder / f"lisa-{ranks}").iterdir()) for ranks in (1, 2)]
    assert kinds[0] == kinds[1]


def test_ctrl_c_stops_all_of_them_and_they_go_on(folder: Path, text: Path, whole: dict[str, Any]) -> None:
    """At the end of one and the same step, with a checkpoint; the resumed run is the whole one bit for bit."""
    output = folder / "stopped"
    argv = arguments(text, output, *USUAL, method="owlore")
    process = subprocess.Popen(
        command(2, argv), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("step 5/"):
            os.killpg(process.pid, signal.SIGINT)
    process.wait()
    assert any("continue with the same command and --resume" in line for line in said), "".join(said)
    resumed = run(2, [*argv, "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert same(output, folder / "owlore-2")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(
    before: int, after: int, folder: Path, text: Path, whole: dict[str, Any]
) -> None:
    """From the checkpoint of two processes on one, and the other way round; the ends differ by rounding."""
    output = folder / f"{before}-{after}"
    argv = arguments(text, output, *USUAL, method="owlore")
    first = subprocess.Popen(command(before, argv), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("step 6/"):
            first.send_signal(signal.SIGINT)
    first.wait()
    assert run(after, [*argv, "--resume"]).returncode == 0
    wanted = summary(folder / "owlore-1")
    assert summary(output)["layer_history"] == wanted["layer_history"]
    assert summary(output)["eval_loss_after"] == pytest.approx(wanted["eval_loss_after"], rel=1e-3)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--batch-size", "3"), "1 micro-batches of 3 rows, which 2 processes cannot share evenly"),
        (("--data", "/nowhere.txt"), "/nowhere.txt"),
        (("--method", "nothing"), "nothing"),
    ],
    ids=["uneven", "no data", "no method"],
)
def test_what_cannot_work_is_said_by_all_of_them(
    more: tuple[str, str], sentence: str, folder: Path, text: Path
) -> None:
    """Each ends with its sentence, none waits for another, and no folder is made."""
    output = folder / "refused"
    for said in refusals(arguments(text, output, "--device", "cpu", *more)):
        assert said.count("lisa-kernels finetune: ") == 1
        assert sentence in said
    assert not output.exists()


def refusals(argv: list[str]) -> list[str]:
    """Return what two processes say of a command that must fail in both.

    They are told their places as torchrun tells them, without it: it ends the others at the first that fails,
    before a slower one has spoken.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    whole = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    places = [ENVIRONMENT | whole | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    both = [subprocess.Popen(command(1, argv), stderr=subprocess.PIPE, text=True, env=place) for place in places]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert all(process.returncode != 0 for process in both)
    return said
