"""What an optimizer may be told, checked at once: a wrong number would show late or never."""

from __future__ import annotations

import math
from typing import Any

from lisa_kernels.errors import InputError
from lisa_kernels.ops.blockwise8 import check_block_size
from lisa_kernels.paging import check_paging

ROUNDINGS = ("stochastic", "nearest")


def as_number(value: Any) -> float:
    """Return a float, NaN for what is no number: NaN passes no check."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def check_hyper(group: dict[str, Any]) -> None:
    """Raise InputError unless a group's learning rate, betas, eps and decay make sense."""
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= as_number(group.get(name)) < math.inf:
            raise InputError(f"{name} is {group.get(name)!r}; a finite number of at least 0 is wanted.")
    betas = group.get("betas")
    pair = [as_number(beta) for beta in betas] if isinstance(betas, (tuple, list)) else []
    if len(pair) != 2 or not all(0.0 <= beta < 1.0 for beta in pair):
        raise InputError(f"betas are {betas!r}; two numbers are wanted, both at least 0 and below 1.")


def check_settings(block_size: int, rounding: str, max_grad_norm: float | None, paging: str | None) -> None:
    """Raise InputError unless the settings of a whole optimizer make sense."""
    check_block_size(block_size)
    check_paging(paging)
    if max_grad_norm is not None and not 0.0 < as_number(max_grad_norm) < math.inf:
        raise InputError(f"max_grad_norm is {max_grad_norm!r}; a finite number above 0 is wanted, or None.")
    if rounding not in ROUNDINGS:
        raise InputError(f"rounding is {rounding!r}; it must be one of {', '.join(ROUNDINGS)}.")
