"""A flow on disk: what it says of itself, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_kernels import InputError
from lisa_kernels.flow.model_file import SETTINGS_FILE, WEIGHTS_FILE, Classes, load_model, save_model

from .test_transformer import flow, inputs

CLASSES = Classes(("cat", "owl", "eel"), "picture of {}")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(flow(reuse="before"), CLASSES, tmp_path)
    return tmp_path


def test_a_flow_comes_back_as_it_was(saved: Path) -> None:
    model, classes, _ = load_model(saved)
    x, labels = inputs()
    times = torch.full((3,), 0.8)
    assert torch.equal(model(x, times, labels), flow(reuse="before")(x, times, labels))
    assert classes == CLASSES
    said = json.loads((saved / SETTINGS_FILE).read_text())
    assert said["times"] == "x_t = (1 - t) noise + t data"
    assert said["model"]["intervals"]["bounds"] == [0.0, 0.25, 0.5, 0.75, 1.0]


def _spoil(folder: Path, name: str, value: Any) -> None:
    path = folder / SETTINGS_FILE
    said = json.loads(path.read_text())
    part = said["model"] if name in said["model"] else said
    part[name] = value
    path.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("times", "x_t = (1 - t) data + t noise", "its images would be wrong"),
        ("routing", "interleaved", "says routing 'interleaved'"),
        ("format", "lisa_kernels flow 2", "says format"),
        ("intervals", {"bounds": [0.0, 1.0], "times": {}, "overlap": 0.0}, "weights"),
        ("shape", {"channels": 1}, "no whole flow"),
    ],
)
def test_a_flow_of_another_convention_is_refused(saved: Path, name: str, value: Any, reason: str) -> None:
    """Backwards times, other layers, other formats; a model whose groups are others has other gates."""
    _spoil(saved, name, value)
    with pytest.raises(InputError, match=reason):
        load_model(saved)


def test_what_is_no_flow_or_is_cut_is_refused(saved: Path, tmp_path: Path) -> None:
    weights = saved / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="no whole flow"):
        load_model(saved)
    (saved / SETTINGS_FILE).write_text("{")
    with pytest.raises(InputError, match="no whole flow"):
        load_model(saved)
    with pytest.raises(InputError, match="holds no flow"):
        load_model(tmp_path / "nowhere")


def test_the_last_checkpoint_stands_for_a_run_that_has_not_ended(tmp_path: Path) -> None:
    for step, seed in ((2, 1), (10, 2)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_model(flow(seed=seed), CLASSES, folder)
    model, _, _ = load_model(tmp_path)
    assert torch.equal(model.patches.places, flow(seed=2).patches.places)


def test_classes_are_found_by_number_and_name() -> None:
    assert [CLASSES.number(given) for given in ("0", "owl", "EEL")] == [0, 1, 2]
    for given in ("3", "-1", "dog"):
        with pytest.raises(InputError, match=r"it knows 0 \(cat\), 1 \(owl\), 2 \(eel\)"):
            CLASSES.number(given)
