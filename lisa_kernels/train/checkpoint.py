"""Checkpoints without pickle: safetensors and JSON."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.files import PARTIAL

# In a checkpoint that ranks wrote together: their rows of the model and its optimizer's state. Beside its place they
# have a longer name, until they are all there.
SHARDS = "shards"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def _split(tree: Any, path: str, tensors: dict[str, Tensor], taken: set[int]) -> Any:
    if isinstance(tree, Tensor):
        tensors[path] = _writable(tree.detach(), taken)
        return {"__tensor__": path}
    if isinstance(tree, dict):
        return {str(key): _split(value, f"{path}/{key}", tensors, taken) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_split(value, f"{path}/{index}", tensors, taken) for index, value in enumerate(tree)]
    return tree


def _writable(tensor: Tensor, taken: set[int]) -> Tensor:
    """Return a tensor as safetensors writes it: on the CPU, in order, with no memory in common with others (`taken`).

    Itself where it is so: what is mapped from a file need not come into memory.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return tensor.to("cpu", copy=True).contiguous()
    storage = tensor.untyped_storage().data_ptr()
    if storage in taken:
        return tensor.clone()
    taken.add(storage)
    return tensor


def _join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if set(tree) == {"__tensor__"}:
            return tensors[tree["__tensor__"]]
        return {key: _join(value, tensors) for key, value in tree.items()}
    return [_join(value, tensors) for value in tree] if isinstance(tree, list) else tree


def tensors_of(tree: Any, path: str) -> dict[str, Tensor]:
    """Return the tensors of a tree by their paths, themselves and no copies."""
    if isinstance(tree, Tensor):
        return {path: tree}
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {name: tensor for key, value in inner for name, tensor in tensors_of(value, f"{path}/{key}").items()}


def save_tree(tree: dict[str, Any], folder: Path, name: str) -> None:
    """Write a tree of dicts, lists, numbers, strings and tensors as `name.json` and `name.safetensors`.

    Keys become strings and tuples lists.
    """
    tensors: dict[str, Tensor] = {}
    plain = _split(tree, "", tensors, set())
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(plain, indent=1))


def load_tree(folder: Path, name: str) -> dict[str, Any]:
    """Read what `save_tree` wrote; raises InputError for files that are missing or broken."""
    try:
        tensors = load_file(folder / f"{name}.safetensors")
        tree: dict[str, Any] = _join(json.loads((folder / f"{name}.json").read_text()), tensors)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder} is not a whole checkpoint ({error}); resume from another, or start afresh."
        ) from error
    return tree


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the run's checkpoints, oldest first."""
    found = [(int(match.group(1)), path) for path in folder.glob("checkpoint-*") if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def checkpoint_step(checkpoint: Path | None) -> int:
    """Return the step that a checkpoint was written after; 0 where there is none."""
    found = None if checkpoint is None else _NAME.match(checkpoint.name)
    return int(found[1]) if found else 0


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted write left behind."""
    for pattern in (f".checkpoint-*{PARTIAL}", ".checkpoint-*.old", f"checkpoint-*-{SHARDS}"):
        for path in [*folder.glob(pattern)]:
            shutil.rmtree(path, ignore_errors=True)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; it stops being one before its files go."""
    doomed = path.with_name(f".{path.name}.old")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of Python's, numpy's and torch's global generators, those of all GPUs with it.

    device: the run's.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.random.get_rng_state(),
        "device": str(device),
    }
    if torch.cuda.is_available():
        state["cuda"] = list(torch.cuda.get_rng_state_all())
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> list[str]:
    """Restore what `random_state` returned, of the GPUs that are here; the run's own goes to `device`, where it is now.

    Returns what there is to say: which generators begin anew.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(state["torch"])
    saved = state.get("cuda", [])
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    before = torch.device(state.get("device", "cuda:0" if saved else "cpu"))
    if before.type != device.type:
        return [
            f"the checkpoint was written on {before} and the run goes on on {device}: what that draws (dropout) begins "
            "anew, and its sums round otherwise"
        ]
    if device.type == "cpu":
        return []
    for index, words in enumerate(saved[:here]):
        torch.cuda.set_rng_state(words, index)
    torch.cuda.set_rng_state(saved[before.index], device)
    if len(saved) == here:
        return []
    return [
        f"the checkpoint was written with {len(saved)} GPUs in sight, and {here} are here; the run goes on on {device}"
    ]
