"""A trained flow as files: its weights as safetensors, and as JSON what they are and how they must be used."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.flow.autoencoder import Autoencoder, load_described
from lisa_kernels.flow.build import described_reader, saved_model
from lisa_kernels.flow.path import CONVENTION
from lisa_kernels.flow.transformer import GroupedFlow
from lisa_kernels.train.checkpoint import find_checkpoints

FORMAT = "lisa_kernels flow 1"
# How a time is brought to the layers that run.
ROUTING = "contiguous groups of equal size, one for each interval of time, the noisiest first"
SETTINGS_FILE, WEIGHTS_FILE = "flow.json", "flow.safetensors"


@dataclass(frozen=True)
class Classes:
    """What labels stand for: a name each, and how an image of one is called, as "handwritten {}"."""

    names: tuple[str, ...]
    kind: str = "{}"

    def number(self, given: str) -> int:
        """Return the label of a class that is given by number or by name; raises InputError."""
        if given.isdecimal() and int(given) < len(self.names):
            return int(given)
        lower = [name.lower() for name in self.names]
        if given.lower() in lower:
            return lower.index(given.lower())
        shown = ", ".join(f"{number} ({name})" for number, name in enumerate(self.names[:12]))
        raise InputError(f"--label {given!r} is no class of this model; it knows {shown}.")


def save_model(
    model: GroupedFlow, classes: Classes, folder: Path, seed: int = 0, autoencoder: Autoencoder | None = None
) -> None:  # fmt: skip
    """Write the model into `folder`, weights first, each file whole or not at all.

    seed: of the run, for the random weights of a preset that reads texts. autoencoder: whose latents it draws.
    """
    weights = folder / f".{WEIGHTS_FILE}.partial"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, weights)
    os.replace(weights, folder / WEIGHTS_FILE)
    settings = folder / f".{SETTINGS_FILE}.partial"
    settings.write_text(json.dumps(described(model, classes, seed, autoencoder), indent=2) + "\n")
    os.replace(settings, folder / SETTINGS_FILE)


def described(
    model: GroupedFlow, classes: Classes, seed: int, autoencoder: Autoencoder | None = None
) -> dict[str, Any]:  # fmt: skip
    """Return what is to be known of the weights."""
    return {
        "format": FORMAT, "times": CONVENTION, "routing": ROUTING, "model": model.settings(),
        "classes": dataclasses.asdict(classes), "backbone": described_reader(model, seed),
        "autoencoder": None if autoencoder is None else autoencoder.described(),
    }  # fmt: skip


def load_model(spec: Path) -> tuple[GroupedFlow, Classes, Autoencoder | None]:
    """Return the model in a run's folder, or of its last checkpoint where the run has not ended; in evaluation.

    With it come its classes, and the autoencoder whose latents it draws; None where it draws pixels.

    Raises InputError for a folder without one, and for a model whose times or routing are of another convention.
    """
    folder = spec if (spec / SETTINGS_FILE).is_file() else next(reversed(find_checkpoints(spec)), spec)
    if not (folder / SETTINGS_FILE).is_file():
        raise InputError(f"{spec} holds no flow (it has no {SETTINGS_FILE}); give the --output of flow train.")
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text())
        check_convention(settings, folder)
        weights = load_file(folder / WEIGHTS_FILE)
        model = saved_model(settings["model"], settings["backbone"], folder)
        classes = Classes(tuple(settings["classes"]["names"]), settings["classes"]["kind"])
        latents = settings.get("autoencoder")
        autoencoder = None if latents is None else load_described(latents, folder)
    except InputError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no whole flow ({error}); train it again, or give another.") from error
    _fill(model, weights, folder)
    return model.eval(), classes, autoencoder


def check_convention(settings: Any, folder: Path) -> None:
    """Raise InputError unless the model's times and routing are those of this version."""
    found = settings if isinstance(settings, dict) else {}
    for name, ours in (("format", FORMAT), ("times", CONVENTION), ("routing", ROUTING)):
        if found.get(name) != ours:
            raise InputError(
                f"the flow in {folder} says {name} {found.get(name)!r}, and this version reads {ours!r}: its images "
                "would be wrong; convert it, or train it anew."
            )


def check_checkpoint(folder: Path, model: GroupedFlow) -> None:
    """Raise InputError unless the checkpoint has the conventions of this version and the groups of this model."""
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a whole checkpoint ({error}); resume from another.") from error
    check_convention(settings, folder)
    if settings.get("model") != model.settings():
        raise InputError(
            f"{folder} was written of another model or of other intervals than this run's; give the options that it "
            "was begun with, or begin another run."
        )


def _fill(model: nn.Module, weights: dict[str, Any], folder: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if len(str(error).splitlines()) > 1 else str(error)
        raise InputError(f"the weights in {folder} are not of the model that its settings name ({reason}).") from error
