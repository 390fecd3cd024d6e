"""What differs between two checkpoints of one model, and which module each difference is of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.difference.checkpoints import Checkpoint
from lisa_kernels.errors import InputError
from lisa_kernels.layers import is_conv1d, is_linear


@dataclass
class Changes:
    """The paths of a model's changed modules: linear ones by their weight, and all that is to be kept whole.

    biases: of the linear ones, those whose bias changed too.
    """

    model: nn.Module
    linears: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)

    def is_transposed(self, path: str) -> bool:
        """Return whether a linear module stores its weight [n, m]."""
        return is_conv1d(self.model.get_submodule(path))

    def tied_embedding(self) -> str | None:
        """Return the path of the token embedding where it changed and the output layer reads it too."""
        tied = bool(getattr(self.model.config.get_text_config(), "tie_word_embeddings", False))  # type: ignore[operator,union-attr]
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        found = [path for path in self.whole if self.model.get_submodule(path) is embedding]
        return found[0] if tied and found else None


def find_changes(base: Checkpoint, tuned: Checkpoint, config: Any) -> Changes:
    """Return what changed between two checkpoints; reads them a tensor at a time.

    config: of the model. Raises InputError for checkpoints of different models, or that store weights under names that
    are not the model's own.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    _check_alike(base, tuned)
    found = Changes(model)
    changed = [name for name in sorted(tuned.names) if not torch.equal(base.read(name), tuned.read(name))]
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if strange := [name for name in changed if name not in known]:
        raise InputError(
            f"{tuned.folder} stores {strange[0]!r}, which is no parameter of a {type(model).__name__}: weights stored "
            "under other names than the model's cannot become an adapter here."
        )
    for path in dict.fromkeys(name.rpartition(".")[0] for name in changed):
        module = model.get_submodule(path)
        if is_linear(module) and not _is_head(model, module) and f"{path}.weight" in changed:
            found.linears.append(path)
            if f"{path}.bias" in changed:
                found.biases.append(path)
        else:
            found.whole.append(path)
    if not changed:
        raise InputError(f"{tuned.folder} holds the very weights of {base.folder}: there is no difference to write.")
    if not found.linears:
        raise InputError(
            f"no linear layer of {tuned.folder} differs from {base.folder}, only {', '.join(found.whole[:3])}: peft "
            "loads no adapter without one; share the tuned model itself."
        )
    return found


def _is_head(model: nn.Module, module: nn.Module) -> bool:
    """Return whether a module is the output layer, which may be tied to the embedding."""
    return module is model.get_output_embeddings()  # type: ignore[operator]


def _check_alike(base: Checkpoint, tuned: Checkpoint) -> None:
    if other := sorted(tuned.names ^ base.names):
        raise InputError(
            f"{base.folder} and {tuned.folder} are not checkpoints of one model: only one has {other[0]!r}."
        )
    for name in sorted(tuned.names):
        one, other_shape = base.shape(name), tuned.shape(name)
        if one != other_shape:
            raise InputError(
                f"{name} is {one} in {base.folder} and {other_shape} in {tuned.folder}: an adapter cannot resize it."
            )


def differences(base: Checkpoint, tuned: Checkpoint, changes: Changes) -> Iterator[tuple[str, Tensor]]:
    """Yield (path, tuned − base) of the changed linears, float32 [m, n] on the CPU, one at a time."""
    for path in changes.linears:
        name = f"{path}.weight"
        more = tuned.read(name).float() - base.read(name).float()
        if not torch.isfinite(more).all():
            raise InputError(f"{name} has a NaN or an infinity in one of the two checkpoints: no factors have that.")
        yield path, more.t() if changes.is_transposed(path) else more


def folder_of(spec: str, where: Path | None) -> Path:
    """Return the folder of a model's files; of one that is on the hub, downloaded if it is not here."""
    if where is not None:
        return where
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(spec, allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]))
