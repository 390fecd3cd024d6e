"""`lisa-kernels flow sample`: images of a trained flow as a picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lisa_kernels.devices import choose_device, survey_machine
from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.flow.model_file import Classes, load_model
from lisa_kernels.flow.pictures import GUIDANCE, check_picture, make_images, write_grid
from lisa_kernels.flow.sample import SOLVERS
from lisa_kernels.flow.transformer import GroupedFlow
from lisa_kernels.progress import progress_bar


@dataclass(frozen=True)
class SampleOptions:
    """Options of the command, one field a flag; see its help for units and defaults."""

    model: Path
    plot: Path
    label: Sequence[str] | None = None
    text: Sequence[str] | None = None
    count: int = 10
    steps: int = 40
    solver: str = "euler"
    guidance: float = GUIDANCE
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        for name in ("count", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; at least 1 is wanted.")
        if self.solver not in SOLVERS:
            raise unknown_name("--solver", self.solver, SOLVERS)
        if not 0 <= self.guidance < float("inf"):
            raise InputError(f"--guidance is {self.guidance}; a finite number of at least 0 is wanted.")
        if self.label and self.text:
            raise InputError("both --label and --text are given; give one of them.")
        check_picture(self.plot)


def _rows(options: SampleOptions, model: GroupedFlow, classes: Classes) -> tuple[list[int], list[str]]:
    """Return the label of each row of the picture, and its name."""
    if options.text:
        tell = getattr(model, "tell", None)
        if tell is None:
            raise InputError("--text was given to a flow that knows classes alone; give --label, or train --backbone.")
        tell(options.text)
        return list(range(len(options.text))), list(options.text)
    every = [str(number) for number in range(len(classes.names))]
    rows = [classes.number(label) for label in options.label or every]
    return rows, [classes.names[row] for row in rows]


def draw_samples(options: SampleOptions, console: Console) -> dict[str, Any]:
    """Write the picture; returns what it shows and what it took."""
    device = choose_device(options.device, survey_machine())
    model, classes, autoencoder = load_model(options.model.expanduser())
    rows, names = _rows(options, model, classes)
    model.to(device)
    labels = torch.tensor(rows).repeat_interleave(options.count)
    begun = time.perf_counter()
    with progress_bar("sampling", options.steps, console) as advance:
        images = make_images(
            model, labels, steps=options.steps, solver=options.solver, guidance=options.guidance, seed=options.seed,
            autoencoder=autoencoder, progress=advance,
        )  # fmt: skip
    seconds = time.perf_counter() - begun
    write_grid(images, options.count, options.plot, names)
    console.print(
        f"{len(labels)} images in {seconds:.1f} s, {options.steps} steps of {model.route.size} of {model.route.layers} "
        f"layers each; picture in {options.plot}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return {
        "picture": str(options.plot), "images": len(labels), "labels": rows, "steps": options.steps,
        "layers_per_evaluation": model.route.size, "layers": model.route.layers, "seconds": seconds,
    }  # fmt: skip
