"""The end of a run: what was trained is safe, whatever fails after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import arguments, write_text

from lisa_kernels.cli import main
from lisa_kernels.train import finish


def test_whatever_fails_after_training_the_model_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held-out loss, summary, adapter and last lines all fail; the weights were written before any of them."""
    from transformers import AutoModelForCausalLM

    evaluations: list[Any] = []

    def loss(*given: Any) -> float:
        evaluations.append(given)
        if len(evaluations) == 1:
            return 5.0
        assert (tmp_path / "run" / "model.safetensors").exists()
        raise torch.OutOfMemoryError("out of memory")

    def fails(*given: Any, **named: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("lisa_kernels.train.trainer.held_out_loss", loss)
    monkeypatch.setattr(finish, "write_json", fails)
    monkeypatch.setattr(finish, "_tell", fails)
    monkeypatch.setattr("lisa_kernels.methods.SampledAdamW.save_adapter", fails)
    data = write_text(tmp_path)
    assert main(arguments(data, tmp_path / "run", "--steps", "1", method="lora-fa")) == 0
    told = " ".join(capsys.readouterr().err.split())
    for what in ("held-out loss after training", "summary.json)", "adapter alone", "end of what is printed"):
        assert f"{what} is left out (" in told
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_a_folder_that_takes_no_more_does_not_cost_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that others filled during training: the model is elsewhere, and where is told."""
    from transformers import AutoModelForCausalLM

    real, folders = finish.save_final_model, []

    def save(model: Any, tokenizer: Any, folder: Path, state: Any = None) -> None:
        folders.append(folder)
        if len(folders) == 1:
            raise OSError(28, "No space left on device")
        real(model, tokenizer, folder, state)

    monkeypatch.setattr(finish, "save_final_model", save)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(arguments(write_text(tmp_path), tmp_path / "run", "--steps", "1")) == 0
    assert str(folders[1]) in capsys.readouterr().err.replace("\n", "")
    assert folders[1].parent == tmp_path
    AutoModelForCausalLM.from_pretrained(folders[1])
