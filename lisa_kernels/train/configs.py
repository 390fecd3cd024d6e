"""What `--model` names, and its configuration: found, read, and refused where no training can come of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lisa_kernels.errors import InputError
from lisa_kernels.layers import quantised_by
from lisa_kernels.train.presets import PRESETS, preset_config
from lisa_kernels.train.records import HUB_ID
from lisa_kernels.train.sample import SAMPLE_PREFIX, SAMPLES, sample_folder

PRESET_PREFIX = "preset:"


def unusable_config_errors() -> tuple[type[Exception], ...]:
    """Return what transformers raises for configurations that contradict themselves, when reading or building them."""
    from huggingface_hub.errors import StrictDataclassError

    return (
        OSError, ValueError, RuntimeError, LookupError, ImportError, TypeError, AttributeError, ArithmeticError,
        AssertionError, StrictDataclassError,
    )  # fmt: skip


def reason_of(error: Exception) -> str:
    """Return the line of an error's text that says what is wrong."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    # Errors of checked fields begin with the name of the check.
    line = lines[-1] if lines[0].endswith(":") else lines[0]
    return line.removeprefix("ValueError: ").removeprefix("TypeError: ").rstrip(".:")


def load_config(spec: str) -> Any:
    """Return the configuration of the causal language model that `spec` names; its weights need not be there.

    spec: as for `load_model`, or the path of a config.json. Of one in bitsandbytes' codes it is that of the model in 16
    bits which they are made into. Raises InputError.
    """
    config = stored_config(spec)
    if quantised_by(config) is not None:
        del config.quantization_config
    return config


def stored_config(spec: str) -> Any:
    """Return the configuration as `load_config` does, with how its weights are quantised where they are stored."""
    from transformers import AutoConfig

    if spec.startswith(PRESET_PREFIX):
        return preset_config(spec.removeprefix(PRESET_PREFIX))
    path = Path(spec).expanduser()
    if path.suffix == ".json" and not path.is_file():
        raise InputError(f"configuration {spec!r} does not exist: give the path of a config.json.")
    where = path if path.suffix == ".json" else locate(spec)
    if where is not None and where.is_dir() and not (where / "config.json").is_file():
        raise InputError(f"model directory {spec!r} has no config.json: give one that save_pretrained wrote.")
    try:
        config = AutoConfig.from_pretrained(
            spec if where is None else str(where), local_files_only=where is not None, trust_remote_code=False
        )
    except unusable_config_errors() as error:
        raise unloadable("configuration", spec, where, error) from error
    _check_causal(spec, config)
    _check_unquantised(spec, config)
    _check_heads(spec, config)
    return config


def locate(spec: str) -> Path | None:
    """Return the directory that `spec` names, or None when it can only be a hub id."""
    if spec.startswith(SAMPLE_PREFIX):
        return sample_folder(spec.removeprefix(SAMPLE_PREFIX))
    path = Path(spec).expanduser()
    wanted = "give preset:NAME, sample:NAME, a directory with config.json and weights, or a Hugging Face model id"
    if path.is_dir():
        return path
    if spec in PRESETS:
        raise InputError(f"model {spec!r} is the name of a preset: write {PRESET_PREFIX}{spec}.")
    if spec in SAMPLES:
        raise InputError(f"model {spec!r} is the name of a sample: write {SAMPLE_PREFIX}{spec}.")
    if path.exists():
        raise InputError(f"model {spec!r} is a file: {wanted}.")
    if not HUB_ID.fullmatch(spec):
        raise InputError(f"model {spec!r} does not exist: {wanted}.")
    return None


def _check_causal(spec: str, config: Any) -> None:
    """Raise InputError unless transformers has a causal language model for the config and the checkpoint is one."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as KNOWN

    saved_as = (getattr(config, "architectures", None) or [""])[0]
    causal = KNOWN.get(type(config), ())
    names = {cls.__name__ for cls in (causal if isinstance(causal, tuple) else (causal,))}
    # A name that transformers does not have may be an old spelling of the causal class, so it passes.
    if not names or (hasattr(transformers, saved_as) and saved_as not in names):
        raise InputError(
            f"model {spec!r} is a {saved_as or type(config).__name__}, not a causal language model:"
            " give one that AutoModelForCausalLM loads, such as a Llama, Qwen or Mistral."
        )


def _check_unquantised(spec: str, config: Any) -> None:
    """Raise InputError for a checkpoint whose weights are stored in fewer than 16 bits, but in bitsandbytes' codes."""
    for part in (config, config.get_text_config()):
        method = quantised_by(part)
        if method is not None and not (method == "bitsandbytes" and part is config):
            raise InputError(
                f"model {spec!r} is stored quantised (quantization_config: {method}), and weights that train have 16 "
                "or 32 bits; give the checkpoint that it was made from, or one in bitsandbytes' 4 bits, with "
                "--resting nf4 or int8 for 4 or 8 bits on the device."
            )


def _check_heads(spec: str, config: Any) -> None:
    """Raise InputError for heads that cannot share their keys, which transformers would notice in the first forward."""
    text = config.get_text_config()
    heads, shared = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise InputError(
            f"configuration {spec!r} has {heads} attention heads and {shared} key-value heads, and the first is no "
            "multiple of the second: correct its config.json."
        )


def check_sequence_length(config: Any, seq_len: int) -> str | None:
    """Return what to say of rows longer than the model was made for; None if they are not.

    Raises InputError where the model looks positions up in a table, which has no more rows.
    """
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or seq_len <= most:
        return None
    if getattr(text, "rope_parameters", None) is None and getattr(text, "rope_theta", None) is None:
        raise InputError(
            f"--seq-len {seq_len} is more than the {most} positions that the model has; give at most {most}."
        )
    return f"--seq-len {seq_len} is more than the {most} positions that the model was made for"


def unloadable(what: str, spec: str, where: Path | None, error: Exception) -> InputError:
    reason = reason_of(error)
    if where is not None:
        mend = "correct its config.json" if what == "configuration" else "save it again with save_pretrained"
        return InputError(f"{what} {spec!r} cannot be loaded ({reason}): {mend}.")
    return InputError(
        f"{what} {spec!r} is no local directory, and the Hugging Face hub could not be reached or has no such model"
        f" ({reason}): local directories and {PRESET_PREFIX}NAME ({', '.join(PRESETS)}) work offline."
    )
