"""Models that are an adapter's folder: the base that it names, with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lisa_kernels.errors import InputError
from lisa_kernels.methods.peft_folder import CONFIG_FILE
from lisa_kernels.requirements import require
from lisa_kernels.train.models import load_model


def base_of(spec: str) -> str:
    """Return the model that an adapter's folder says it is for; `spec` itself where it is no such folder."""
    folder = Path(spec).expanduser()
    if (folder / "config.json").is_file() or not (folder / CONFIG_FILE).is_file():
        return spec
    try:
        base = json.loads((folder / CONFIG_FILE).read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{folder / CONFIG_FILE} is no JSON object ({error}); give a folder that peft wrote."
        ) from error
    if not base:
        raise InputError(f"the adapter {spec!r} does not name its base (base_model_name_or_path in {CONFIG_FILE}).")
    return str(base)


def tokenizer_of(spec: str) -> str:
    """Return where the tokenizer of a model is: with an adapter, or else with its base."""
    folder = Path(spec).expanduser()
    has_one = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return spec if has_one else base_of(spec)


def load_with_adapter(spec: str, dtype: torch.dtype, seed: int) -> Any:
    """Return the model that `spec` names, an adapter's weights added to its base's; see `load_model`."""
    base = base_of(spec)
    model = load_model(base, dtype, seed)
    if base == spec:
        return model
    require(f"the adapter {spec!r}", "peft")
    from peft import PeftModel

    return PeftModel.from_pretrained(model, spec).merge_and_unload()
