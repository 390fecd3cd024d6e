"""Images of a flow as one picture, a row for each class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.flow.autoencoder import Autoencoder
from lisa_kernels.flow.sample import guided, sample
from lisa_kernels.flow.transformer import GroupedFlow

PICTURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
# Strength of guidance where nothing else is asked for.
GUIDANCE = 2.0


def check_picture(path: Path) -> None:
    """Raise InputError for a file that no picture can be written to."""
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise InputError(f"--plot {path} names no kind of picture; give one of {', '.join(PICTURE_SUFFIXES)}.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"--plot {path} cannot be written there; give a file in a folder that exists.")


def make_images(
    model: GroupedFlow, labels: Tensor, *, steps: int = 40, solver: str = "euler", guidance: float = 1.0,
    seed: int = 0, autoencoder: Autoencoder | None = None, progress: Callable[[], None] | None = None,
) -> Tensor:  # fmt: skip
    """Return float32 [labels, channels, height, width] from −1 to 1 on the CPU; the noise depends on the seed alone.

    autoencoder: that of the latents that the model draws.
    """
    device = next(model.parameters()).device
    shape = model.shape
    noise = torch.randn(
        len(labels), shape.channels, shape.height, shape.width, generator=torch.Generator().manual_seed(seed)
    )
    anything = model.condition(torch.full((len(labels),), model.any_class, device=device))
    condition = model.condition(labels.to(device))
    images = sample(
        guided(model, guidance, anything), model.route, noise.to(device), condition, steps=steps, solver=solver,
        progress=progress,
    )  # fmt: skip
    pixels = images.float() if autoencoder is None else autoencoder.decode(images.float())
    return pixels.clamp(-1, 1).cpu()


def write_grid(images: Tensor, columns: int, path: Path, names: Sequence[str] = ()) -> None:
    """Write images [n, channels, height, width] row by row; names: of the rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count, channels, height, width = images.shape
    rows = -(-count // columns)
    blank = torch.ones(rows * columns - count, channels, height, width)
    tiles = torch.nn.functional.pad(torch.cat([images, blank]), (1, 1, 1, 1), value=1.0)
    wall = tiles.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).reshape(channels, rows * (height + 2), -1)
    shown = ((wall + 1) / 2).permute(1, 2, 0).expand(-1, -1, 3) if channels == 1 else ((wall + 1) / 2).permute(1, 2, 0)
    figure = Figure(figsize=(0.7 * columns + 1.2, 0.7 * rows * height / width + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shown.numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([(row + 0.5) * (height + 2) - 0.5 for row in range(len(names))], list(names))
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.savefig(path, dpi=120)


def write_samples(
    model: GroupedFlow, path: Path, names: Sequence[str] = (), each: int = 10, seed: int = 0, most: int = 20,
    guidance: float = GUIDANCE, autoencoder: Autoencoder | None = None,
) -> None:  # fmt: skip
    """Draw `each` images of the first `most` classes."""
    classes = min(model.any_class, most)
    labels = torch.arange(classes).repeat_interleave(each)
    steps = max(40, model.route.groups)
    images = make_images(model, labels, steps=steps, guidance=guidance, seed=seed, autoencoder=autoencoder)
    write_grid(images, each, path, names[:classes])
