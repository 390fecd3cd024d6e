"""Groups that begin as copies of a dense flow's layers: what is common to all times is learnt once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from lisa_kernels.errors import InputError
from lisa_kernels.flow.autoencoder import Autoencoder, check_same_latents
from lisa_kernels.flow.model_file import Classes, load_model
from lisa_kernels.flow.transformer import GroupedFlow


@torch.no_grad()
def copy_groups(model: GroupedFlow, source: GroupedFlow) -> None:
    """Make the weights of `model` those of `source`: what is shared, and each group's blocks.

    source: a flow of one group with as many layers as a group of `model`, each of which then computes what it does at
    all times; or one of as many groups of as many layers. Raises InputError for a flow of other sizes.
    """
    theirs, ours = source.route, model.route
    alike = dataclasses.replace(source.shape, layers=model.shape.layers) == model.shape
    if not alike or theirs.size != ours.size or theirs.groups not in (1, ours.groups):
        raise InputError(
            f"the flow to begin from has {theirs.groups} groups of {theirs.size} layers and the shape {source.shape}; "
            f"{ours.groups} groups of {ours.size} layers of the shape {model.shape} begin from one of 1 or "
            f"{ours.groups} groups of {ours.size} layers that is otherwise alike."
        )
    weights = source.state_dict()
    if theirs.groups != ours.groups:
        blocks = source.blocks.state_dict()
        weights = {name: weight for name, weight in weights.items() if not name.startswith("blocks.")}
        for name, weight in blocks.items():
            number, _, rest = name.partition(".")
            weights |= {f"blocks.{first + int(number)}.{rest}": weight for first in range(0, ours.layers, ours.size)}
    model.load_state_dict(weights)


def begin_from(model: GroupedFlow, classes: Classes, spec: Path, autoencoder: Autoencoder | None = None) -> None:
    """Make the weights of `model` those of the flow in a run's folder, see `copy_groups`. Raises InputError."""
    source, known, theirs = load_model(spec)
    if known.names != classes.names:
        raise InputError(
            f"the flow in {spec} draws {', '.join(known.names[:12])}, and the data of this run are "
            f"{', '.join(classes.names[:12])}; begin from a flow of the same classes."
        )
    check_same_latents(autoencoder, theirs, spec)
    copy_groups(model, source)
