"""Kill -9 at random moments, five times: the run ends with the very bytes of one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import arguments, summary, write_text

KILLS = 5
STEPS = 40


def _command(data: Path, output: Path, method: str, *more: str) -> list[str]:
    flags = ["--steps", str(STEPS), "--save-every", "3", "--period", "4", *more]
    return [sys.executable, "-m", "lisa_kernels.cli", *arguments(data, output, *flags, method=method)]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _kill_at_random(command: list[str], draw: random.Random) -> str:
    """Start the run, let it train for a random number of steps and a little more, and kill it."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_environment())
    assert process.stderr is not None
    lines_left = draw.randint(1, 9)
    last = ""
    for line in process.stderr:
        if line.startswith("step "):
            last = line
            lines_left -= 1
            if not lines_left:
                break
    time.sleep(draw.random() * 0.1)
    process.send_signal(signal.SIGKILL)
    process.stderr.close()
    process.wait()
    return last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings", "killed_settings"),
    [
        ("lisa", [], []),
        ("owlore", [], []),
        # What was left alone has its masters in memory.
        ("owlore", ["--resting", "nf4", "--dtype", "bf16"], ["--masters", "{folder}"]),
    ],
    ids=["lisa", "owlore", "masters in files"],
)
def test_five_kills_change_no_bit(
    method: str, settings: list[str], killed_settings: list[str], tmp_path: Path
) -> None:  # fmt: skip
    data = write_text(tmp_path)
    subprocess.run(_command(data, tmp_path / "whole", method, *settings), check=True, env=_environment())
    draw = random.Random(method)
    output = tmp_path / "killed"
    settings = [*settings, *(word.format(folder=tmp_path / "masters") for word in killed_settings)]
    reached = []
    for kill in range(KILLS):
        more = ["--resume"] if kill else []
        reached.append(_kill_at_random(_command(data, output, method, *settings, *more), draw))
        assert (tmp_path / "masters").exists() == bool(killed_settings)
    assert all(reached), "every kill came during training"
    assert not (output / "summary.json").exists()
    subprocess.run(_command(data, output, method, *settings, "--resume"), check=True, env=_environment())
    assert not (tmp_path / "masters").exists()
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (output / "model.safetensors").read_bytes() == whole
    for name in ("layer_visits", "layer_history", "eval_loss_before", "eval_loss_after"):
        assert summary(output)[name] == summary(tmp_path / "whole")[name]
