"""Factors and whole modules as a folder that peft loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lisa_kernels.difference.changes import Changes
from lisa_kernels.difference.checkpoints import Checkpoint
from lisa_kernels.difference.factors import Factors
from lisa_kernels.files import written_whole
from lisa_kernels.methods.peft_folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE, target_names

# How a model is spoken to goes with what it learned.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
)  # fmt: skip


def write_difference(
    folder: Path, base_name: str, changes: Changes, factors: Mapping[str, Factors], tuned: Checkpoint, whole: bool
) -> int:  # fmt: skip
    """Write an adapter folder, whole or not at all, and return the bytes of its weights.

    Each product B A is the difference itself: alpha equals the rank. Where ranks differ from matrix to matrix peft's
    rank_pattern and alpha_pattern say so. The tuned model's tokenizer goes with it. whole: keep modules that are no
    linear ones, and biases, as they are tuned.
    """
    tensors = dict[str, Tensor]()
    for path, each in factors.items():
        dtype = tuned.dtype(f"{path}.weight")
        for side, matrix in zip("AB", each.pair()):
            tensors[f"{path}.lora_{side}.weight"] = matrix.to(dtype)
    if whole:
        tensors.update(_whole(changes, tuned, factors))
    with written_whole(folder) as partial:
        owned = {f"{PREFIX}{name}": tensor.clone().contiguous() for name, tensor in tensors.items()}
        save_file(owned, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        config = _config(base_name, changes, factors, whole)
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        for name in TOKENIZER_FILES:
            if (tuned.folder / name).is_file():
                shutil.copyfile(tuned.folder / name, partial / name)
        return (partial / WEIGHTS_FILE).stat().st_size


def _whole(changes: Changes, tuned: Checkpoint, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    kept = {f"{path}.base_layer.bias": tuned.read(f"{path}.bias") for path in changes.biases if path in factors}
    for name, stored in _whole_names(changes, tuned).items():
        kept[name] = tuned.read(stored)
    return kept


def _whole_names(changes: Changes, tuned: Checkpoint) -> dict[str, str]:
    """Return the parameters of the modules that are kept whole, each with the name that its tensor is stored under.

    peft wants a tied output layer in the file as well as the embedding.
    """
    names = {}
    for path in changes.whole:
        for name, _ in changes.model.get_submodule(path).named_parameters(recurse=False):
            if f"{path}.{name}" in tuned.names:
                names[f"{path}.{name}"] = f"{path}.{name}"
    if (tied := changes.tied_embedding()) is not None:
        head = changes.model.get_output_embeddings()  # type: ignore[operator]
        path = next(path for path, module in changes.model.named_modules() if module is head)
        names[f"{path}.weight"] = f"{tied}.weight"
    return names


def whole_bytes(changes: Changes, tuned: Checkpoint) -> int:
    """Return the bytes of what would be kept whole."""
    names = [*_whole_names(changes, tuned).values(), *(f"{path}.bias" for path in changes.biases)]
    return sum(map(tuned.size_bytes, names))


def _config(base_name: str, changes: Changes, factors: Mapping[str, Factors], whole: bool) -> dict[str, Any]:
    ranks = {path: each.rank for path, each in factors.items()}
    top = max(ranks.values(), default=1)
    others = {path: rank for path, rank in ranks.items() if rank != top}
    saved = target_names(changes.model, changes.whole) if whole and changes.whole else None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": top,
        "lora_alpha": top,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "all" if whole and changes.biases else "none",
        "fan_in_fan_out": any(map(changes.is_transposed, factors)),
        "target_modules": target_names(changes.model, factors),
        "modules_to_save": saved,
        "ensure_weight_tying": saved is not None and changes.tied_embedding() is not None,
    }
