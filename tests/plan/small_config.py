"""A configuration small enough to rehearse in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SMALL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


def write_config(folder: Path, **changes: Any) -> Path:
    """Write a config.json, with these settings changed, into `folder`; returns its path."""
    path = folder / "config.json"
    path.write_text(json.dumps({**SMALL, **changes}))
    return path
