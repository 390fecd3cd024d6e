"""Models without weights: every parameter has its shape and dtype, and no memory."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lisa_kernels.errors import InputError
from lisa_kernels.train.configs import load_config, reason_of, unusable_config_errors
from lisa_kernels.train.models import parse_dtype


def empty_model(model: Any, dtype: str) -> Any:
    """Return a causal language model on torch's meta device, in training mode.

    model: as for `load_config`, or a configuration of transformers. dtype: "fp32", "bf16" or "fp16". Raises
    InputError for what is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    # A copy: transformers writes the dtype into it.
    config = load_config(model) if isinstance(model, str) else copy.deepcopy(model)
    with torch.device("meta"):
        try:
            made = AutoModelForCausalLM.from_config(config, dtype=parse_dtype(dtype))
        except unusable_config_errors() as error:
            raise InputError(
                f"no causal language model can be built from this configuration ({reason_of(error)}); give one that "
                "AutoModelForCausalLM takes, such as a Llama, Qwen or Mistral."
            ) from error
    made.config.use_cache = False
    return made.train()
