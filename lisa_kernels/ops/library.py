"""Registration of operations that take lists of tensors: schema, definition, fake and one kernel per kind of device.

`torch.library.custom_op` would do the same at six microseconds per tensor of the lists, which for ten thousand small
parameters is more than their whole step.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

from lisa_kernels import native

_LIBRARY = torch.library.Library("lisa_kernels", "FRAGMENT")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an operation that runs its PyTorch definition wherever no kernel is registered; returns it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lisa_kernels::{name}", fake, lib=_LIBRARY)
    operation: Callable[..., Any] = getattr(torch.ops.lisa_kernels, name).default
    return operation


def implement_cpu(name: str, kernel: Callable[..., Any]) -> None:
    """Run an operation on CPU tensors through the compiled library, which `kernel` takes first; without one, not."""
    compiled = native.load()
    if compiled is not None:
        _LIBRARY.impl(name, partial(kernel, compiled), "CPU")


@lru_cache(maxsize=1)
def triton_present() -> bool:
    """Whether Triton can be imported here; asked without importing it."""
    return importlib.util.find_spec("triton") is not None


def triton_kernel(module: str, name: str) -> Callable[..., Any]:
    """Return a function that calls `name` of `module`, imported at the first call: Triton loads where it is used."""

    def launch(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments)

    return launch


def implement_triton(name: str, module: str) -> None:
    """Run an operation on CUDA tensors through the function of that name in `module`; without Triton, not."""
    if triton_present():
        _LIBRARY.impl(name, triton_kernel(module, name), "CUDA")
