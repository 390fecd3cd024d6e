"""Functions that a compiled model runs as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function such that `torch.compile` calls it and never looks into it.

    torch's own `torch.compiler.disable` does that too, but loads the compiler, and Triton with it, where it is written.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            whole: Callable[P, R] = torch.compiler.disable(function)
            return whole(*args, **kwargs)
        return function(*args, **kwargs)

    return call
