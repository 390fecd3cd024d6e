"""Refuse, each with the reason and what works instead, the models that no method can be attached to."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lisa_kernels.distributed import (
    Ranks,
    check_fully_sharded,
    check_not_shared_out,
    check_not_wrapped,
    is_sharded,
    units_of,
)
from lisa_kernels.errors import InputError
from lisa_kernels.layers.dequantized import mend_conversions, quantised_by
from lisa_kernels.layers.freezing import COPY_ADVICE, check_checkpointing, is_attached, is_copy

TRAINABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def without_compiler(model: nn.Module) -> nn.Module:
    """Return the model inside what `torch.compile` made of it; that goes on compiling it, whatever is attached."""
    inside = getattr(model, "_orig_mod", None)
    return inside if isinstance(inside, nn.Module) else model


def check_attachable(model: nn.Module, ranks: Ranks | None = None) -> None:
    """Refuse models that cannot be attached, each with the reason and what works instead; ranks: who trains it."""
    if is_attached(model):
        raise InputError("this model is already attached; call detach() on its optimizer first.")
    if is_copy(model):
        raise InputError(f"this model is a copy of an attached one; {COPY_ADVICE}")
    check_not_wrapped(model)
    sharded = bool(units_of(model))
    check_not_shared_out(model, sharded)
    if sharded:
        check_fully_sharded(model, ranks)
    _check_adapters(model)
    _check_placement(model)
    _check_weights(model)
    check_checkpointing(model)


def _check_adapters(model: nn.Module) -> None:
    """Refuse adapters of peft: their layers read weights in their own way, and what is saved would be theirs."""
    # The names that peft's layers and models share, whatever the kind of adapter.
    layer = next((path for path, module in model.named_modules() if hasattr(module, "adapter_layer_names")), None)
    if layer is not None or hasattr(model, "peft_config"):
        where = f"in {layer}" if layer else "around it"
        raise InputError(
            f"the model carries adapters of peft ({where}); merge them first with merge_and_unload(), then call "
            "requires_grad_(True) on what is to train, or train the adapters with an optimizer such as AdamW8bit."
        )


def _check_placement(model: nn.Module) -> None:
    """Refuse a model whose parts are on several devices, or are moved there and back by accelerate."""
    devices = sorted({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(devices) > 1:
        raise InputError(
            f"the model is spread over {', '.join(devices)} by its device_map; load it on one device, without "
            'device_map or with device_map={"": 0}.'
        )
    hooked = [path for path, module in model.named_modules() if path and hasattr(module, "_hf_hook")]
    if hooked:
        raise InputError(
            f"accelerate moves the weights of {hooked[0]} by a hook at each forward (device_map or cpu_offload); load "
            "the model on one device without it; gradient checkpointing and paging= save memory here."
        )


def _check_weights(model: nn.Module) -> None:
    method = quantised_by(getattr(model, "config", None))
    if method == "bitsandbytes":
        raise InputError(
            "the model is quantised by bitsandbytes, and weights that learn have 16 or 32 bits: call "
            "lisa_kernels.dequantize(model) first, which makes them in host memory of what the codes mean, and attach "
            "it with resting='nf4' (or 'int8') and device=, to compute with codes as before."
        )
    if method is not None or getattr(model, "hf_quantizer", None) is not None:
        raise InputError(
            f"the model is quantised by {method or 'a loader of its own'}, and its weights train in 16 or 32 bits: "
            "load one in float32, bfloat16 or float16, such as that which it was made from, and give resting='nf4' or "
            "'int8' for weights of 4 or 8 bits."
        )
    mend_conversions(model)
    for name, param in model.named_parameters():
        if param.dtype not in TRAINABLE_DTYPES:
            raise InputError(
                f"{name} holds {param.dtype}; float32, bfloat16 or float16 is wanted: load the model in one of these, "
                "without quantisation."
            )
        if is_traceable_wrapper_subclass(param) and not is_sharded(param):
            raise InputError(
                f"{name} is a {type(param).__name__}, packed in its own way; load the model without quantisation."
            )
        if param.is_meta:
            raise InputError(f"{name} is on the meta device and has no values; load the weights before attaching.")
