"""A model in a checkpoint: one file or, where its masters are files, links to these with the rest beside them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.methods import SampledAdamW
from lisa_kernels.paging.tensor_file import header_of

SINGLE, INDEX, REST = "model.safetensors", "model.safetensors.index.json", "model-rest.safetensors"


def save_model(model: Any, folder: Path, optimizer: SampledAdamW) -> None:
    """Write a model as transformers loads it; a master that is a file and no layer's that trains is linked.

    So a checkpoint writes what has changed in layers that train, and what is still in the files that the model was
    loaded from. A link keeps a master's file as long as the checkpoint is there.
    """
    masters = optimizer.layout.masters
    linked = {} if masters is None else masters.files()
    if not linked:
        model.save_pretrained(folder)
        return
    state: dict[str, Tensor] = model.state_dict()
    model.save_pretrained(folder, state_dict={name: value for name, value in state.items() if name not in linked})
    single = folder / SINGLE
    names = header_of(single)[0].keys() - {"__metadata__"} if single.is_file() else None
    if names is None or not names <= state.keys():
        # Several files, or other names than the model's own: as transformers would have it.
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        model.save_pretrained(folder)
        return
    single.rename(folder / REST)
    places = dict.fromkeys(names, REST)
    for name, path in linked.items():
        places[name] = f"{name}.safetensors"
        _link(path, folder / places[name])
    size = sum(state[name].nbytes for name in places)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=1))


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        # On another disk, or one that has no links.
        shutil.copyfile(path, target)


def is_linked(checkpoint: Path) -> bool:
    """Return whether the model of a checkpoint is in several files."""
    return (checkpoint / INDEX).is_file() and not (checkpoint / SINGLE).is_file()


def load_linked(model: Any, checkpoint: Path) -> None:
    """Load a model that is in several files, all at once: they are mapped.

    Raises InputError where a weight is in none of them.
    """
    files = sorted(set(json.loads((checkpoint / INDEX).read_text())["weight_map"].values()))
    state = {name: tensor for file in files for name, tensor in load_file(checkpoint / file).items()}
    named = dict(model.named_parameters(remove_duplicate=False))
    saved = {named[name] for name in state if name in named}
    # A tied weight has one of its names there.
    lacking = sorted(name for name in model.state_dict().keys() - state.keys() if named.get(name) not in saved)
    if lacking:
        raise InputError(
            f"{checkpoint} lacks {lacking[0]}{f' and {len(lacking) - 1} more weights' if lacking[1:] else ''}; resume "
            "from another checkpoint."
        )
    model.load_state_dict(state, strict=False)
