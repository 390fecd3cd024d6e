"""Running a model on calibration batches without leaving a trace in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.errors import InputError


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode without KV caches and, at the end, each of its modules back into its own.

    A cache is filled once more by a block that runs twice. Models around a language model take no `use_cache`.
    """
    training = {module: module.training for module in model.modules()}
    configs: dict[int, Any] = {
        id(config): config for config in (getattr(module, "config", None) for module in training)
    }
    caching = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    model.eval()
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True
        for module, mode in training.items():
            module.training = mode


def without_logits(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs of a model whose blocks alone are looked at: it forms as few logits as it can, and no loss."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return dict(inputs)
    return {"logits_to_keep": 1, **{name: value for name, value in inputs.items() if name != "labels"}}


def calibration_inputs(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Any]]:
    """Yield each batch as keyword arguments for the model, on its device and, where it has one, without a KV cache.

    Raises `InputError` when there is no batch, or one that is not a mapping.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    count = 0
    for count, batch in enumerate(batches, start=1):
        if not isinstance(batch, Mapping):
            raise InputError(
                f"calibration batch {count - 1} is a {type(batch).__name__}: give a mapping of the model's argument "
                f"names to tensors, such as {{'input_ids': ...}}."
            )
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        yield {**options, **moved}
    if not count:
        raise InputError("there is no calibration batch: give at least one.")
