"""Adapters as peft's folders: `adapter_config.json` and `adapter_model.safetensors`, written and read."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.files import written_whole
from lisa_kernels.methods.adapter_layout import new_head
from lisa_kernels.methods.adapters import Adapters
from lisa_kernels.methods.definitions import AdapterMethod, LoRA

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# Where peft sets one of these, the layer is not y = x Wᵀ + s · (x Aᵀ) Bᵀ with one rank and one s for all layers.
OTHER_FORMS = (
    "use_dora", "use_rslora", "use_qalora", "use_bdlora", "lora_bias", "rank_pattern", "alpha_pattern",
    "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip
# Starts that leave the base as it is; the others (pissa, olora, corda, …) move a part of W into the adapter.
PLAIN_STARTS = ("gaussian", "orthogonal", "eva")
# bfloat16 moves the squared length of a unit row by up to 2⁻⁸.
ORTHONORMAL = 1e-2


def write_adapter(adapters: Adapters, folder: Path) -> None:
    """Write the adapters as a folder that peft loads, whole or not at all.

    A folder that is there is replaced if it holds an adapter and nothing else, and refused with InputError otherwise.
    """
    folder = folder.expanduser().resolve()
    check_replaceable(folder)
    tensors = dict(adapters.head())
    for path, layer in adapters.layers.items():
        tensors[f"{path}.lora_A.weight"] = layer.basis.to(torch.float32)
        tensors[f"{path}.lora_B.weight"] = adapters.slot(path).t()
    # safetensors refuses views of one storage and strided tensors: each gets its own copy.
    owned = {f"{PREFIX}{name}": value.to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    with written_whole(folder) as partial:
        save_file(owned, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        (partial / CONFIG_FILE).write_text(json.dumps(_peft_config(adapters), indent=2) + "\n")


def check_replaceable(folder: Path, beside: Iterable[str] = ()) -> None:
    """Raise InputError unless an adapter, with files `beside` it, can take this folder's place without a loss."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the adapter.")
    others = sorted({path.name for path in folder.glob("*")} - {CONFIG_FILE, WEIGHTS_FILE, *beside})
    if others:
        raise InputError(f"{folder} holds {others[0]}, which writing an adapter would delete; give a new folder.")


def _peft_config(adapters: Adapters) -> dict[str, Any]:
    model, alpha = adapters.model, adapters.method.alpha
    heads, task = list(new_head(model)), _task_type(model)
    model_class = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": None if task else model_class,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": adapters.method.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for layer in adapters.layers.values()),
        "target_modules": target_names(model, adapters.layers, heads),
        "modules_to_save": heads or None,
    }


def _task_type(model: nn.Module) -> str | None:
    """Return peft's name of what the model is for, as transformers says it; None for what peft has no name for."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    can_generate = getattr(model, "can_generate", None)
    if callable(can_generate) and can_generate():
        is_pair = getattr(model.config, "is_encoder_decoder", False)
        return "SEQ_2_SEQ_LM" if is_pair else "CAUSAL_LM"
    return TASKS.get(getattr(model, "loss_type", None) or "")


def target_names(model: nn.Module, paths: Iterable[str], heads: Sequence[str] = ()) -> list[str]:
    """Return names by which peft finds exactly the modules at these paths.

    peft takes every module whose path ends with a name: the last part of a path will do where all modules of that name
    have adapters (it passes over `heads` by itself), else the whole path is given.
    """
    wanted, bearers = set(paths), defaultdict(set)
    for path, _ in model.named_modules():
        if path.partition(".")[0] not in heads:
            bearers[path.rpartition(".")[2]].add(path)
    names = ((path, path.rpartition(".")[2]) for path in wanted)
    return sorted({name if bearers[name] <= wanted else path for path, name in names})


def read_adapter(adapters: Adapters, folder: Path) -> None:
    """Take over the adapter in a folder that peft or `write_adapter` wrote, of the same rank and the same layers.

    LoRA takes A as it is. LoRA-FA does where its rows are orthonormal; another is split, A = L Q with Q's rows
    orthonormal, Q is frozen in its place and L goes into B: the product, and so the model's function, is the adapter's.
    Another alpha goes into B as well. Raises InputError, the model untouched, for anything else.
    """
    folder = folder.expanduser()
    config, tensors = _read_files(folder)
    scale = _check_config(config, adapters.method, folder)
    _check_tensors(tensors, adapters, config, folder)
    factors = {}
    for path, layer in adapters.layers.items():
        down, up = (tensors.pop(f"{path}.lora_{side}.weight") for side in "AB")
        up = up.to(torch.float64) * (scale / layer.scale)
        if isinstance(adapters.method, LoRA):
            factors[path] = down, up.t()
        else:
            factors[path] = split(down, up, layer.stored_weight.dtype)
    for path, (basis, slot) in factors.items():
        adapters.layers[path].basis.copy_(basis)
        adapters.layers[path].slot.data.copy_(slot)
    head = adapters.head()
    for name, value in tensors.items():
        head[name].copy_(value)


def split(down: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (basis `dtype` [r, n], slot float32 [r, m]) with slotᵀ @ basis = up @ down and the basis orthonormal.

    down: [r, n]; up: [m, r]. Where `dtype` cannot hold the basis, the slot is the best one for what it does hold.
    """
    down, up = down.to(torch.float64), up.to(torch.float64)
    deviation = (down @ down.t() - torch.eye(len(down), dtype=torch.float64)).abs().max()
    basis = (down if deviation <= ORTHONORMAL else torch.linalg.qr(down.t()).Q.t()).to(dtype)
    if not torch.equal(basis.to(torch.float64), down):
        up = up @ torch.linalg.lstsq(basis.to(torch.float64).t(), down.t()).solution.t()
    return basis, up.t().to(torch.float32)


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} has no {name}; a folder that save_adapter, or peft with safetensors, wrote is wanted."
            )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} holds no whole adapter ({error}); save it again.") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG_FILE} holds no settings; save the adapter again.")
    return config, {name.removeprefix(PREFIX): value for name, value in tensors.items()}


def _check_config(config: dict[str, Any], method: AdapterMethod, folder: Path) -> float:
    """Return the adapter's scale, alpha / r."""
    kind, rank, alpha, start = (config.get(name) for name in ("peft_type", "r", "lora_alpha", "init_lora_weights"))
    if kind != "LORA":
        raise InputError(f"the adapter in {folder} is of peft's type {kind}; LORA is wanted.")
    others = [name for name in OTHER_FORMS if config.get(name)]
    if isinstance(start, str) and start not in PLAIN_STARTS:
        others.append(f"init_lora_weights={start}")
    if others:
        raise InputError(
            f"the adapter in {folder} uses {', '.join(others)}, which has no form here; merge it into its base "
            "with peft and attach to the result."
        )
    if rank != method.rank:
        raise InputError(
            f"the adapter in {folder} has rank {rank}, this model was attached with rank {method.rank}: attach it with "
            f"{type(method).__name__}(rank={rank})."
        )
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise InputError(f"the adapter in {folder} has lora_alpha {alpha!r}; a finite number is wanted.")
    return float(alpha) / method.rank


def _check_tensors(tensors: dict[str, Tensor], adapters: Adapters, config: dict[str, Any], folder: Path) -> None:
    """Refuse layers that differ from the attached ones; a head that is not in the file stays as it is."""
    shapes = {name: tuple(value.shape) for name, value in adapters.head().items()}
    for path, layer in adapters.layers.items():
        shapes[f"{path}.lora_A.weight"] = (layer.rank, layer.in_features)
        shapes[f"{path}.lora_B.weight"] = (layer.out_features, layer.rank)
    lacking = [name for name in shapes if ".lora_" in name and name not in tensors]
    extra = [name for name in tensors if name not in shapes]
    if lacking or extra:
        what = f"has no {lacking[0]}" if lacking else f"holds {extra[0]}, which this model has no place for"
        raise InputError(
            f"the adapter in {folder} {what}; attach the model it was made for, with its targets: "
            f"{config.get('target_modules')}."
        )
    for name, value in tensors.items():
        if tuple(value.shape) != shapes[name]:
            raise InputError(
                f"{name} of the adapter in {folder} is {list(value.shape)}; this model needs {list(shapes[name])}: "
                "attach the model it was made for."
            )
        if not torch.isfinite(value).all():
            raise InputError(f"{name} of the adapter in {folder} holds a NaN or an infinity; save it again.")
