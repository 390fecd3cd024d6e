"""Configurations of models: read, and refused in one sentence where no training can come of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lisa_kernels.errors import InputError
from lisa_kernels.train.configs import check_sequence_length, load_config
from lisa_kernels.train.empty_model import empty_model
from lisa_kernels.train.models import load_model, parse_dtype

SIZES = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "pad_token_id": None,
}  # fmt: skip

INCONSISTENT: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"hidden_size": 33}, "33"),
    "no heads": ({"num_attention_heads": 0}, "zero"),
    "shared heads": ({"num_key_value_heads": 3}, "key-value"),
    "vocabulary": ({"vocab_size": -3}, "-3"),
    "activation": ({"hidden_act": "swooosh"}, "swooosh"),
    "type": ({"model_type": "nonesuch"}, "nonesuch"),
    "a word for a size": ({"hidden_size": "big"}, "big"),
    "half a unit": ({"hidden_size": 32.5}, "32.5"),
    "rope": ({"rope_scaling": {"type": "nope", "factor": 2.0}}, "nope"),
    "pad": ({"pad_token_id": 5000}, "adding"),
    "kinds of layers": ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types"),
}

QUANTISED: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "mxfp4": {"quant_method": "mxfp4"},
    "a method without a name": {"bits": 4},
}


def written(folder: Path, **more: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**SIZES, **more}))
    return str(path)


@pytest.mark.parametrize("case", INCONSISTENT)
def test_a_configuration_that_contradicts_itself_is_one_sentence(case: str, tmp_path: Path) -> None:
    """Whether transformers notices it when reading, when building, or only in the first forward."""
    values, named = INCONSISTENT[case]
    with pytest.raises(InputError, match=named):
        empty_model(written(tmp_path, **values), "fp32")


def test_a_sound_configuration_is_built(tmp_path: Path) -> None:
    """The cases differ from it in one field each."""
    assert empty_model(written(tmp_path), "fp32").config.num_hidden_layers == 2


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_checkpoint_is_named_before_anything_is_loaded(method: str, tmp_path: Path) -> None:
    """A plan would count 16-bit weights, and a run would load it all to find that nothing can train."""
    spec = written(tmp_path, quantization_config=QUANTISED[method])
    with pytest.raises(InputError, match=f"quantised .*{method}"):
        load_config(spec)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="quantised"):
        load_model(str(tmp_path), parse_dtype("fp32"), 0)


def test_a_checkpoint_in_bitsandbytes_codes_is_planned_as_what_these_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without the package no weight is loaded, by a sentence that says what to install."""
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    model = empty_model(written(tmp_path, quantization_config=packed), "bf16")
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert not hasattr(model.config, "quantization_config")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"needs bitsandbytes.*pip install 'lisa_kernels\[bitsandbytes\]'"):
        load_model(str(tmp_path), parse_dtype("fp32"), 0)


def test_quantised_language_models_inside_others_are_named_too(tmp_path: Path) -> None:
    """In models of several towers the text model has a configuration of its own."""
    config = AutoConfig.for_model("llama", **{k: v for k, v in SIZES.items() if k != "model_type"})
    config.get_text_config = lambda: AutoConfig.for_model("llama", quantization_config=QUANTISED["fp8"])
    from lisa_kernels.train.configs import _check_unquantised

    with pytest.raises(InputError, match="fp8"):
        _check_unquantised("towers", config)


def test_rows_longer_than_a_table_of_positions_are_refused() -> None:
    """GPT-2 looks positions up; Llama computes them, and is told of only."""
    table = AutoConfig.for_model("gpt2", n_positions=64)
    assert check_sequence_length(table, 64) is None
    with pytest.raises(InputError, match="at most 64"):
        check_sequence_length(table, 65)
    computed = AutoConfig.for_model("llama", max_position_embeddings=64)
    assert check_sequence_length(computed, 64) is None
    assert "64 positions" in str(check_sequence_length(computed, 65))
