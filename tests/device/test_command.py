"""`lisa-kernels finetune` whole, from a saved model to a saved model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from device.small_model import save_small_model, small_command
from lisa_kernels.cli import main
from lisa_kernels.layers import Visits


@pytest.mark.order("late")
@pytest.mark.parametrize("more", [[], ["--resting", "mixed", "--scores", "outlier"]], ids=["16-bit", "mixed"])
def test_a_run_that_was_stopped_and_goes_on_has_the_bytes_of_one_that_was_not(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of four, as a kill after the second checkpoint leaves them, and the rest; in bfloat16."""
    visited: list[str] = []
    enter = Visits.__enter__

    def note(visits: Visits) -> None:
        visited.append(str(visits.device))
        enter(visits)

    monkeypatch.setattr(Visits, "__enter__", note)
    save_small_model(tmp_path)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    given = ["--steps", "4", "--save-every", "2", "--dtype", "auto", "--device", "cuda:0", *more]
    assert main(small_command(tmp_path, whole, *given)) == 0
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoint-4")
    for path in (*stopped.glob("*.safetensors"), stopped / "summary.json"):
        path.unlink()
    assert main(small_command(tmp_path, stopped, *given, "--resume")) == 0
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    # Scores, and what matrices lose, of weights on the host; the run that goes on has its scores.
    assert "--resting" not in more or visited == ["cuda:0"] * 3
    begun = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert (whole / "model.safetensors").read_bytes() != begun
