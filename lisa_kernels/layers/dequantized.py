"""A model that transformers loaded through bitsandbytes, made an ordinary one again: weights that can learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lisa_kernels.errors import InputError

# The classes of bitsandbytes' weights; the package itself need not be there to know them.
PACKED = ("Params4bit", "Int8Params")


def quantised_by(config: Any) -> str | None:
    """Return by what the weights of a configuration are quantised, such as "bitsandbytes"; None: by nothing."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    values = found if isinstance(found, dict) else vars(found) if hasattr(found, "__dict__") else {}
    method = values.get("quant_method")
    return "a method without a name" if method is None else str(getattr(method, "value", method))


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Make the weights of a model in bitsandbytes' 4 or 8 bits plain ones, in place; returns the model.

    They are what its codes mean, in `dtype` as all others then are (default: that of the model's configuration, others
    as they are), and with all the rest in host memory, to where they come a matrix at a time: where the model computed
    there are never more than its own bytes and one matrix. Then `attach(model, ..., resting="nf4", device=...)` rests
    it in the NF4 codes that it was loaded with, beside masters that learn. What is saved is a model in 16 bits. One
    that is not quantised is returned as it is.
    Raises InputError, the model untouched, for other ways of quantising.
    """
    config = getattr(model, "config", None)
    method = quantised_by(config)
    layers = {path: layer for path, layer in model.named_modules() if is_packed(layer)}
    if method not in (None, "bitsandbytes") or (method is None and getattr(model, "hf_quantizer", None) is not None):
        raise InputError(
            f"the model is quantised by {method or 'a loader of its own'}, and only bitsandbytes' 4 and 8 bits can be "
            "made plain weights here: load the model that this one was made from."
        )
    moved = next((path for path, layer in layers.items() if _is_rearranged(layer)), None)
    if moved is not None:
        raise InputError(
            f"bitsandbytes has rearranged the codes of {moved} for this CPU, in a forward without gradients, and has "
            "rounded their scales: load the model anew, and call dequantize before it is used."
        )
    given = dtype or getattr(config, "dtype", None)
    for path, layer in layers.items():
        model.set_submodule(path, _plain(layer, given))
    if layers or method is not None:
        _forget(model)
        model.to("cpu")
        for param in model.parameters():
            # Not buffers: tables of angles stay exact.
            if dtype is not None:
                param.data = param.data.to(dtype)
    return model


def is_packed(layer: nn.Module) -> bool:
    """Return whether a layer's weight is in bitsandbytes' codes."""
    return type(getattr(layer, "weight", None)).__name__ in PACKED


def _is_rearranged(layer: Any) -> bool:
    """Return whether codes are in the order of a CPU's products, which is not how they are dequantised."""
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))


def _plain(layer: Any, dtype: torch.dtype | None) -> nn.Module:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    with torch.no_grad():
        weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    weight = weight.to("cpu", dtype or weight.dtype)
    bias = None if layer.bias is None else layer.bias.detach().to("cpu", dtype or layer.bias.dtype)
    with torch.device("meta"):
        made = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None)
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = nn.Parameter(bias)
    return made.train(layer.training)


def _forget(model: Any) -> None:
    """Have nothing of a transformers model say any more that it is quantised."""
    for name in ("hf_quantizer", "quantization_method", "hf_device_map"):
        if hasattr(model, name):
            delattr(model, name)
    if quantised_by(getattr(model, "config", None)) is not None:
        del model.config.quantization_config
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_is_quantized", False):
            module.config._is_quantized = False
    model.is_quantized = model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    mend_conversions(model)


def mend_conversions(model: Any) -> None:
    """Have `save_pretrained` of a model that was dequantised not fail: transformers remembers how it was loaded.

    What it then cannot undo it would find out in saving (5.23: NotImplementedError), with a run's work in the model.
    Without the memory it finds the conversions of the model's class anew.
    """
    try:
        for conversion in getattr(model, "_weight_conversions", None) or ():
            conversion.reverse_transform()
    except NotImplementedError:
        model._weight_conversions = None
