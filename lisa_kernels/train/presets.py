"""Model geometries that need no network: published shapes and two small ones, all with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lisa_kernels.errors import unknown_name


@dataclass(frozen=True)
class Preset:
    """A model family of transformers (its `model_type`) and the settings that fix its geometry."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    extra: dict[str, Any] = field(default_factory=dict)


LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG_ROPE = {"rope_type": "default", "rope_theta": 1000000.0}

PRESETS: dict[str, Preset] = {
    "tiny": Preset("llama", 128, 344, 8, 4, 4, 2048, 2048),
    "small": Preset("llama", 384, 1024, 12, 6, 6, 4096, 2048),
    "tinyllama-1.1b": Preset("llama", 2048, 5632, 22, 32, 4, 32000, 2048),
    "llama-2-7b": Preset("llama", 4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-3.1-8b": Preset("llama", 4096, 14336, 32, 32, 8, 128256, 131072, rope_parameters=LLAMA_31_ROPE),
    "qwen2.5-7b": Preset("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072, rms_norm_eps=1e-6, rope_parameters=LONG_ROPE),
    "mistral-7b": Preset(
        "mistral", 4096, 14336, 32, 32, 8, 32768, 32768, rope_parameters=LONG_ROPE, extra={"sliding_window": None}
    ),
}


def preset_config(name: str) -> Any:
    """Return the transformers config of a preset, input and output embeddings untied.

    The special token ids are those of the tokenizer that presets train: token 0 ends a text, nothing begins one.
    Raises InputError for an unknown name.
    """
    from transformers import AutoConfig

    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    settings = {key: value for key, value in vars(PRESETS[name]).items() if key not in ("model_type", "extra")}
    settings["rope_parameters"] = dict(settings["rope_parameters"])
    # No pad_token_id: transformers would give that token's embedding row, here the end token's, no gradient.
    special = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False}
    return AutoConfig.for_model(PRESETS[name].model_type, **settings, **special, **PRESETS[name].extra)
