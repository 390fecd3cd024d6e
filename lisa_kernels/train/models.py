"""Turn what `--model` names into a causal language model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.train.presets import PRESETS, preset_config
from lisa_kernels.train.records import HUB_ID
from lisa_kernels.train.sample import SAMPLE_PREFIX, sample_folder

PRESET_PREFIX = "preset:"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
END_OF_TEXT = "<|endoftext|>"
MAX_TRAINED_VOCABULARY = 4096
BYTE_VOCABULARY = 257  # the 256 bytes and the end of text
TOKENIZER_TRAINING_CHARACTERS = 4_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype called fp32, bf16 or fp16; auto is bf16 on a CUDA device that computes in it, else fp32."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    if name not in DTYPES:
        raise unknown_name("dtype", name, [*DTYPES, "auto"])
    return DTYPES[name]


def load_model(spec: str, dtype: torch.dtype, seed: int) -> Any:
    """Return the model that `spec` names, on the CPU, with every weight in `dtype`.

    spec: `preset:NAME` (random weights, a function of `seed`), `sample:NAME` (a pretrained model from a package), a
    directory with config.json and safetensors weights, or a hub id. The global random state is left as it was.
    Raises InputError for a model that cannot be trained.
    """
    from transformers import AutoModelForCausalLM

    if spec.startswith(PRESET_PREFIX):
        config = preset_config(spec.removeprefix(PRESET_PREFIX))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    where = _locate(spec)
    if where is not None:
        _check_model_directory(spec, where)
    model, missing = _from_pretrained(spec, where, dtype)
    if missing:
        raise InputError(
            f"model {spec!r} lacks {len(missing)} weights of a {type(model).__name__} ({', '.join(missing[:3])}, ...):"
            " they would be random; give a complete checkpoint of a causal language model."
        )
    check_no_meta(model)
    return model


def load_config(spec: str) -> Any:
    """Return the configuration of the causal language model that `spec` names; its weights need not be there.

    spec: as for `load_model`, or the path of a config.json. Raises InputError.
    """
    from transformers import AutoConfig

    if spec.startswith(PRESET_PREFIX):
        return preset_config(spec.removeprefix(PRESET_PREFIX))
    path = Path(spec).expanduser()
    if path.suffix == ".json" and not path.is_file():
        raise InputError(f"configuration {spec!r} does not exist: give the path of a config.json.")
    where = path if path.suffix == ".json" else _locate(spec)
    if where is not None and where.is_dir() and not (where / "config.json").is_file():
        raise InputError(f"model directory {spec!r} has no config.json: give one that save_pretrained wrote.")
    try:
        config = AutoConfig.from_pretrained(
            spec if where is None else str(where), local_files_only=where is not None, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise _unloadable("configuration", spec, where, error) from error
    _check_causal(spec, config)
    return config


def enable_checkpointing(model: Any, **settings: Any) -> None:
    """Have the model keep only what enters each block, and compute the rest again in the backward.

    settings: more arguments of `torch.utils.checkpoint.checkpoint`.
    """
    # The new name came with transformers 5.20; the old one goes with 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **settings})


def _from_pretrained(spec: str, where: Path | None, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """Return the model and the names of its weights that the checkpoint does not hold."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    source = spec if where is None else str(where)
    options: dict[str, Any] = {"local_files_only": where is not None, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        _check_causal(spec, config)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise _unloadable("model", spec, where, error) from error
    return model, sorted(info["missing_keys"])


def load_tokenizer(spec: str, texts: Iterable[str], vocab_size: int) -> Any:
    """Return the tokenizer that belongs to the model `spec`; a preset's is trained on `texts`.

    texts and vocab_size (the model's) are read for presets only. Raises InputError where a model has no tokenizer.
    """
    from transformers import AutoTokenizer

    if spec.startswith(PRESET_PREFIX):
        return train_tokenizer(texts, min(vocab_size, MAX_TRAINED_VOCABULARY))
    where = _locate(spec)
    # Without this check transformers makes an empty tokenizer of the config's model type.
    if where is not None and not any((where / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"model directory {spec!r} has no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, ...):"
            " save the tokenizer into it with tokenizer.save_pretrained."
        )
    try:
        return AutoTokenizer.from_pretrained(
            spec if where is None else str(where), local_files_only=where is not None, trust_remote_code=False
        )
    except Exception as error:  # tokenizer files are parsed by native code that raises plain Exception
        raise _unloadable("tokenizer of model", spec, where, error) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Return a byte-level BPE tokenizer trained on at most about 4 MB of the texts, taken evenly from all of them.

    Any text survives encoding and decoding; token 0, `<|endoftext|>`, is both end and padding. The result is a
    function of the arguments alone.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < BYTE_VOCABULARY:
        raise InputError(f"a vocabulary of {vocab_size} tokens is too small: {BYTE_VOCABULARY} or more are wanted.")
    pieces = list(texts)
    share = min(1.0, TOKENIZER_TRAINING_CHARACTERS / max(1, sum(map(len, pieces))))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece[: int(len(piece) * share)] for piece in pieces), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def check_token_ids(model: Any, max_token_id: int) -> None:
    """Raise InputError when a token of the data has no row in the model's embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    if max_token_id >= rows:
        raise InputError(
            f"the data hold token id {max_token_id} but the model's embedding has {rows} rows:"
            " use the model's own tokenizer, or resize the embedding with model.resize_token_embeddings."
        )


def check_no_meta(model: Any) -> None:
    """Raise InputError when a parameter or buffer is on the meta device, so has no values."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if empty:
        raise InputError(
            f"{len(empty)} tensors of the model are on the meta device, so have no values ({empty[0]}, ...):"
            " load the weights before training."
        )


def _locate(spec: str) -> Path | None:
    """Return the directory that `spec` names, or None when it can only be a hub id."""
    if spec.startswith(SAMPLE_PREFIX):
        return sample_folder(spec.removeprefix(SAMPLE_PREFIX))
    path = Path(spec).expanduser()
    wanted = "give preset:NAME, sample:NAME, a directory with config.json and weights, or a Hugging Face model id"
    if path.is_dir():
        return path
    if spec in PRESETS:
        raise InputError(f"model {spec!r} is the name of a preset: write {PRESET_PREFIX}{spec}.")
    if path.exists():
        raise InputError(f"model {spec!r} is a file: {wanted}.")
    if not HUB_ID.fullmatch(spec):
        raise InputError(f"model {spec!r} does not exist: {wanted}.")
    return None


def _check_model_directory(spec: str, where: Path) -> None:
    if not (where / "config.json").is_file():
        adapter = " (it holds an adapter, not a model)" if (where / "adapter_config.json").is_file() else ""
        raise InputError(
            f"model directory {spec!r} has no config.json{adapter}: give a directory that save_pretrained wrote."
        )
    if not any((where / name).is_file() for name in WEIGHT_FILES):
        raise InputError(
            f"model directory {spec!r} has a config.json but no weights: {WEIGHT_FILES[0]} or its index is wanted;"
            " save the model again with model.save_pretrained."
        )


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


def _unloadable(what: str, spec: str, where: Path | None, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
    if where is not None:
        return InputError(f"{what} {spec!r} cannot be loaded ({reason}): save it again with save_pretrained.")
    return InputError(
        f"{what} {spec!r} is no local directory, and the Hugging Face hub could not be reached or has no such model"
        f" ({reason}): local directories and {PRESET_PREFIX}NAME ({', '.join(PRESETS)}) work offline."
    )
