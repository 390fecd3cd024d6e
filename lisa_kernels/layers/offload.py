"""Checkpoints in host memory: what the blocks of a model are computed from again waits off the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lisa_kernels.errors import InputError
from lisa_kernels.layers.host_copies import HostCopies


def offload_checkpoints(model: nn.Module) -> None:
    """Let the checkpoints of a transformers model wait in locked host memory until their block's backward.

    They take tokens · n elements per block, and no more than one at a time is on the device. Weights and what is
    recomputed stay; so do the inputs that no gradient reaches, for they are dropped or are a single block's: those up
    to the lowest active layer where embeddings are frozen. On a CPU nothing is copied. Switching checkpointing on once
    more ends it. Raises InputError for a model that makes no checkpoints.
    """
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    if not checkpointed:
        raise InputError(
            "this model keeps its activations, so it has no checkpoints to offload; switch gradient checkpointing on "
            'first: gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
        )
    copies = HostCopies()
    for module in checkpointed:
        settings = getattr(module._gradient_checkpointing_func, "keywords", {})
        # Where transformers puts it, and each block looks for it.
        module._gradient_checkpointing_func = functools.partial(_checkpoint_on_host, copies, **settings)  # type: ignore[assignment]


def _checkpoint_on_host(copies: HostCopies, block: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
    """Do what torch's checkpoint does, the inputs that a gradient flows to being saved in host memory."""
    places = [place for place, value in enumerate(inputs) if isinstance(value, Tensor) and value.requires_grad]
    if not places:
        return checkpoint(block, *inputs, **settings)
    # Masks and the like belong to all blocks: they are held as they are, and not once more by each.
    held = [None if place in places else value for place, value in enumerate(inputs)]

    def from_flowing(*flowing: Tensor) -> Any:
        values = held.copy()
        for place, value in zip(places, flowing):
            values[place] = value
        return block(*values)

    flowing = [inputs[place] for place in places]
    # Inside, the checkpoint's own hooks replace these: only its inputs are seen here.
    with _kept_on_host(copies, flowing[0].device.type):
        return checkpoint(from_flowing, *flowing, **settings)


def _kept_on_host(copies: HostCopies, device: str) -> saved_tensors_hooks:
    if device == "meta":
        # A plan: the device is to hold nothing meanwhile.
        return saved_tensors_hooks(
            lambda tensor: (tensor.shape, tensor.dtype), lambda kept: torch.empty(kept[0], dtype=kept[1], device="meta")
        )
    if device == "cuda":
        return saved_tensors_hooks(copies.send, copies.bring_back)
    return save_on_cpu(pin_memory=device != "cpu", device_type=device)
