"""Images of a flow as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lisa_kernels.cli import main
from lisa_kernels.flow.command import SampleOptions
from lisa_kernels.flow.pictures import make_images, write_grid, write_samples

from .small_run import arguments
from .test_transformer import flow


@pytest.mark.parametrize("channels", [1, 3])
def test_images_lie_row_by_row(channels: int, tmp_path: Path) -> None:
    """Dark, half and bright ones in their places, and what lies between and beyond them white."""
    images = torch.stack([torch.full((channels, 4, 6), value) for value in (-1.0, 0.0, 1.0, -1.0, 0.0)])
    write_grid(images, 3, tmp_path / "grid.png", ["a", "b"])
    grey = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    dark, half = (np.argwhere(np.abs(grey.astype(int) - value) < 4) for value in (0, 128))
    middle = grey.shape[0] / 2
    # Letters are dark too, and stand on the left.
    for found in (dark, half):
        assert (found[:, 0] < middle).any()
        assert (found[:, 0] > middle).any()
    assert half[:, 1].mean() > dark[:, 1].mean()
    assert (grey[:, -3:] > 250).all()


def test_the_noise_of_an_image_depends_on_the_seed_alone() -> None:
    """Not on the steps, nor on what else is drawn; values stay between −1 and 1."""
    model, labels = flow(), torch.tensor([0, 1, 2])
    first = make_images(model, labels, steps=4, seed=1)
    torch.testing.assert_close(make_images(model, labels[:1], steps=4, seed=1), first[:1])
    assert not torch.allclose(make_images(model, labels, steps=4, seed=2), first)
    assert float(first.abs().max()) <= 1


def test_samples_of_many_classes_are_those_of_the_first(tmp_path: Path) -> None:
    write_samples(flow(classes=30), tmp_path / "samples.svg", [f"class {n}" for n in range(30)], each=1, most=3)
    text = (tmp_path / "samples.svg").read_text()
    assert "class 2" in text
    assert "class 3" not in text


def test_samples_of_a_run_are_guided_as_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where training left labels out; a flow that never saw that has nothing to be guided by."""
    model, drawn, told = flow(), list[Any](), list[float]()
    monkeypatch.setattr("lisa_kernels.flow.pictures.write_grid", lambda images, *_: drawn.append(images))
    write_samples(model, tmp_path / "samples.png", each=1)
    labels = torch.arange(model.any_class)
    assert torch.equal(
        drawn[0], make_images(model, labels, guidance=SampleOptions(tmp_path, tmp_path / "a.png").guidance)
    )
    assert not torch.allclose(drawn[0], make_images(model, labels), atol=1e-3)
    monkeypatch.setattr("lisa_kernels.flow.run.write_samples", lambda *_, guidance, **__: told.append(guidance))
    for dropout in ("0.1", "0"):
        assert main(arguments(tmp_path / dropout, "--steps", "1", "--label-dropout", dropout)) == 0
    assert told == [2.0, 1.0]
