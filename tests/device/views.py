"""What queued work keeps of its arguments: of tensors on a device their addresses, of all others the values."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .simulated import driver, fault

_DELTAS = [driver.sim_alias(device) - driver.sim_base(device) for device in range(driver.sim_device_count())]


class View(NamedTuple):
    """A tensor on a device, without a hold on its memory."""

    address: int
    device: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def is_cuda(value: Any) -> bool:
    """Whether a value is a tensor on a device."""
    return isinstance(value, Tensor) and value.is_cuda


def view_of(tensor: Tensor) -> View:
    """Return where a tensor's values lie."""
    return View(tensor.data_ptr(), tensor.device.index, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


def host_tensor(view: View) -> Tensor:
    """Return a CPU tensor of the same memory, for queued work only; notes a fault where that is freed by now."""
    if 0 in view.shape or view.address == 0:
        return torch.empty(view.shape, dtype=view.dtype)
    span = 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride))
    nbytes = span * view.dtype.itemsize
    if not driver.sim_is_live(view.address, nbytes):
        fault(f"an operation touches freed or foreign device memory: {view}")
    raw = (ctypes.c_char * nbytes).from_address(view.address + _DELTAS[view.device])
    return torch.frombuffer(raw, dtype=torch.uint8).view(view.dtype).as_strided(view.shape, view.stride)


def keep(value: Any) -> Any:
    """Return what queued work keeps of an argument."""
    if is_cuda(value):
        return view_of(value)
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return None
    return torch.device("cpu") if isinstance(value, torch.device) else value


def restore(value: Any) -> Any:
    """Return a kept argument as an operation on the CPU takes it."""
    return host_tensor(value) if isinstance(value, View) else value


def leaves(value: Any) -> Iterator[Any]:
    """Yield what lists, tuples and dictionaries hold, as torch's own pytree does in ten times the time."""
    if isinstance(value, (list, tuple, dict)) and not isinstance(value, View):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Return a value with the function of each of its leaves; named tuples become plain ones."""
    if isinstance(value, dict):
        return {name: mapped(function, part) for name, part in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, View):
        made = [mapped(function, part) for part in value]
        return made if isinstance(value, list) else tuple(made)
    return function(value)
