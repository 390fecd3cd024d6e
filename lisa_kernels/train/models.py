"""Turn what `--model` names into a causal language model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.layers import dequantize, quantised_by
from lisa_kernels.ops.capability import auto_dtype
from lisa_kernels.requirements import require
from lisa_kernels.train.configs import PRESET_PREFIX, locate, stored_config, unloadable, unusable_config_errors
from lisa_kernels.train.presets import preset_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
END_OF_TEXT = "<|endoftext|>"
MAX_TRAINED_VOCABULARY = 4096
BYTE_VOCABULARY = 257  # the 256 bytes and the end of text
TOKENIZER_TRAINING_CHARACTERS = 4_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def parse_dtype(name: str, device: torch.device | None = None) -> torch.dtype:
    """Return the dtype called fp32, bf16, fp16, or auto: bf16 on a GPU that multiplies it, fp16 on older, else fp32.

    device: the one that trains; by default the first GPU where there is one.
    """
    if name == "auto":
        first = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        return auto_dtype(first if device is None else device)
    if name not in DTYPES:
        raise unknown_name("dtype", name, [*DTYPES, "auto"])
    return DTYPES[name]


def load_model(spec: str, dtype: torch.dtype, seed: int) -> Any:
    """Return the model that `spec` names, on the CPU, with every weight in `dtype`.

    spec: `preset:NAME` (random weights, a function of `seed`), `sample:NAME` (a pretrained model from a package), a
    directory with config.json and safetensors weights, or a hub id; of weights in bitsandbytes' codes what these mean.
    The global random state is left as it was.
    Raises InputError for a model that cannot be trained.
    """
    from transformers import AutoModelForCausalLM

    if spec.startswith(PRESET_PREFIX):
        config = preset_config(spec.removeprefix(PRESET_PREFIX))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    where = locate(spec)
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


def _from_pretrained(spec: str, where: Path | None, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """Return the model and the names of its weights that the checkpoint does not hold."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    config = stored_config(spec)
    packed = quantised_by(config) is not None
    if packed:
        require(f"model {spec!r}, in bitsandbytes' codes,", "bitsandbytes", extra="bitsandbytes")
    # Else transformers chooses a GPU for codes, where one is there.
    options = {"device_map": {"": "cpu"}} if packed else {}
    failures: tuple[type[Exception], ...] = (*unusable_config_errors(), SafetensorError)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            spec if where is None else str(where), config=config, dtype=dtype, use_safetensors=True,
            output_loading_info=True, local_files_only=where is not None, trust_remote_code=False,
            **options,
        )  # fmt: skip
    except failures as error:
        raise unloadable("model", spec, where, error) from error
    return dequantize(model, dtype), sorted(info["missing_keys"])


def packed_note(spec: str, dtype: str) -> str | None:
    """Return what to say of a model that is stored in bitsandbytes' codes; None of others."""
    if quantised_by(stored_config(spec)) is None:
        return None
    return (
        f"{spec} is stored quantised, in bitsandbytes' codes; its weights train and are saved as what these mean, in "
        f"{dtype} (--resting nf4 has the device hold 4 bits of each)"
    )


def load_tokenizer(spec: str, texts: Iterable[str], vocab_size: int) -> Any:
    """Return the tokenizer that belongs to the model `spec`; a preset's is trained on `texts`.

    texts and vocab_size (the model's) are read for presets only. Raises InputError where a model has no tokenizer.
    """
    from transformers import AutoTokenizer

    if spec.startswith(PRESET_PREFIX):
        return train_tokenizer(texts, min(vocab_size, MAX_TRAINED_VOCABULARY))
    where = locate(spec)
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
        raise unloadable("tokenizer of model", spec, where, error) from error


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


def settle_pad_token(tokenizer: Any, model: Any) -> str | None:
    """Have a tokenizer whose pad token has no row in the model's embedding pad with its end token; return what to say.

    Without an end token that has a row the tokenizer is left without a pad token.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or pad < rows:
        return None
    before = tokenizer.pad_token
    tokenizer.pad_token = tokenizer.eos_token if end is not None and end < rows else None
    return (
        f"the tokenizer's pad token {before!r} has id {pad} but the model's embedding {rows} rows:"
        f" {tokenizer.pad_token or 'token 0'!r} pads in its place"
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
