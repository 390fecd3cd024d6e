"""`lisa-kernels flow sample`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lisa_kernels.cli import main
from lisa_kernels.flow.model_file import Classes, save_model

from .test_transformer import flow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    save_model(flow(), Classes(("cat", "owl", "eel")), folder)
    return folder


def arguments(saved: Path, plot: Path, *more: str) -> list[str]:
    return ["flow", "sample", "--model", str(saved), "--plot", str(plot), "--steps", "4", *more]


def test_images_of_a_class_are_drawn(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same for the same seed; guidance, solver and seed each change them."""
    pictures = []
    for number, more in enumerate(([], [], ["--seed", "1"], ["--guidance", "3"], ["--solver", "heun"])):
        plot = tmp_path / f"{number}.png"
        assert main(arguments(saved, plot, "--label", "owl", "--count", "3", "--json", *more)) == 0
        pictures.append(np.asarray(Image.open(plot)).tobytes())
        result = json.loads(capsys.readouterr().out)
        assert (result["images"], result["labels"]) == (3, [1])
        assert (result["layers_per_evaluation"], result["layers"]) == (2, 8)
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == 4


def test_every_class_is_drawn_where_none_is_named(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(saved, tmp_path / "grid.svg", "--count", "2", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == [0, 1, 2]
    assert "eel" in (tmp_path / "grid.svg").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--label", "dog"], "no class of this model"),
        (["--steps", "3"], "at least 4"),
        (["--solver", "heum"], "did you mean 'heun'"),
        (["--count", "0"], "--count is 0"),
        (["--guidance", "nan"], "--guidance is nan"),
        (["--plot", "grid.txt"], "names no kind of picture"),
        (["--plot", "nowhere/grid.png"], "cannot be written there"),
        (["--model", "nowhere"], "holds no flow"),
    ],
)
def test_a_mistake_is_one_sentence(
    more: list[str], said: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(saved, tmp_path / "grid.png", *more)) == 2
    assert said in capsys.readouterr().err


def test_help_has_defaults_and_units(capsys: pytest.CaptureFixture[str]) -> None:
    for action, words in (("train", ("(default: 1000)", "images per forward pass")), ("sample", ("(default: 40)",))):
        with pytest.raises(SystemExit):
            main(["flow", action, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert all(word in text for word in (*words, "--json"))
        assert not any(shown in text for shown in ("None", "default: True", "default: False"))
