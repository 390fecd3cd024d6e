"""What would make the last save fail is one sentence before the first step."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import llama
from rich.console import Console
from small_run import arguments, write_text
from torch import nn

from lisa_kernels import InputError
from lisa_kernels.cli import main
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.save_rehearsal import model_bytes, rehearse_saving


def _rehearse(model: Any, output: Path, *, save: Any = lambda folder: None, **more: Any) -> str:
    """Rehearse, with a tokenizer that is saved by `save`, and return what was printed."""
    text = io.StringIO()
    options = FineTuneOptions(model="preset:tiny", data="stdlib", output=output, **more)
    rehearse_saving(options, model, SimpleNamespace(save_pretrained=save), Console(file=text, width=300))
    return text.getvalue()


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_can_be_saved_leaves_nothing_behind(tied: bool, tmp_path: Path) -> None:
    assert _rehearse(llama(tied=tied), tmp_path / "new" / "run") == ""
    assert list(tmp_path.iterdir()) == []
    assert _rehearse(llama(tied=tied), tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_settings_of_sampling_without_sampling_are_left_out(tmp_path: Path) -> None:
    """transformers saves no such generation_config, and reads none of them; with sampling they stay."""
    model = llama()
    model.generation_config.temperature, model.generation_config.top_p = 0.6, 0.9
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path / "refused")
    told = _rehearse(model, tmp_path / "run")
    assert "temperature, top_p" in told
    model.save_pretrained(tmp_path / "saved")
    sampled = llama()
    sampled.generation_config.do_sample, sampled.generation_config.temperature = True, 0.6
    assert _rehearse(sampled, tmp_path / "run") == ""
    assert sampled.generation_config.temperature == 0.6


def test_a_generation_config_that_nothing_mends_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.generation_config.num_beams, model.generation_config.num_return_sequences = 1, 4
    with pytest.raises(InputError, match="could not be saved at the end"):
        _rehearse(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensors_that_share_memory_in_secret_are_refused(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(model.model.layers[1].self_attn.q_proj.weight.data)
    with pytest.raises(InputError, match="shared tensors"):
        _rehearse(model, tmp_path / "run")


def test_a_tokenizer_that_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    def save(folder: str) -> None:
        raise TypeError("Object of type set is not JSON serializable")

    with pytest.raises(InputError, match="set is not JSON"):
        _rehearse(llama(), tmp_path / "run", save=save)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot be written"):
        _rehearse(llama(), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("more", "models"),
    [
        ({}, 1), ({"save_every": 5, "method": "owlore"}, 4),
        ({"save_every": 5, "max_checkpoints": 1, "method": "owlore"}, 3), ({"save_every": 5, "method": "lora-fa"}, 7),
        ({"save_every": 5}, 7),
    ],
    ids=["no checkpoints", "two and one", "one and one", "adapters and what is beneath", "the default's adapters"],
)  # fmt: skip
def test_the_disk_holds_all_that_is_written(
    more: dict[str, Any], models: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    needed = models * model_bytes(model)
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if fits:
            _rehearse(model, tmp_path / "run", **more)
        else:
            with pytest.raises(InputError, match="give a folder on another disk"):
                _rehearse(model, tmp_path / "run", **more)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_of_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(arguments(write_text(tmp_path), tmp_path / "run")) == 2
    assert "GB left, and this run writes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_models_bytes_are_those_of_its_file(tmp_path: Path) -> None:
    model = llama(tied=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert 0 <= (tmp_path / "model.safetensors").stat().st_size - model_bytes(model) < 5000
