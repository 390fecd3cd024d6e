"""What autocast asks of a device's operations; tensors of torch's meta device, which plans use, know no autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that autocast gives operations on this kind of device; None where it is off."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context in which operations have their operands' dtype."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def as_autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the tensors in the dtype that autocast gives operations where `x` is; as they are where it is off."""
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return (x, *others)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (x, *others))
