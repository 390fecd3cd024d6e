"""The AdamW step on CPUs in C++: one pass per block over all tensors, bit for bit what the reference defines."""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.native import Library, addresses, array_of, counts, float_addresses, pointer, table
from lisa_kernels.ops.adamw8.reference import Scalars


def step_inputs(
    library: Library, steps: list[Tensor], grad_scale: Tensor, bases: Tensor, clock: Tensor, hyper: list[float],
    ends: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the scalars and keys of a step; the contract is the package's."""
    scalars = torch.empty((len(steps), len(Scalars._fields)), dtype=torch.float32)
    keys = torch.empty(len(steps), dtype=torch.int64)
    # Held until the call is over.
    _steps, where = array_of("q", addresses("a count of steps", steps, torch.int64))
    _hyper, hyper_at = array_of("d", hyper)
    _ends, ends_at = array_of("q", ends)
    library.functions["step_inputs"](
        where, pointer("the list of bases", bases, torch.int64), int(clock.item()), float(grad_scale.item()), hyper_at,
        ends_at, len(ends), scalars.data_ptr(), keys.data_ptr(),
    )  # fmt: skip
    return scalars, keys


def _arrays(scalars: Tensor, keys: Tensor) -> tuple[int, int]:
    return pointer("the table of scalars", scalars, torch.float32), pointer("the list of keys", keys, torch.int64)


def adamw8_(
    library: Library, params: list[Tensor], grads: list[Tensor], m_codes: list[Tensor], m_absmax: list[Tensor],
    v_codes: list[Tensor], v_absmax: list[Tensor], scalars: Tensor, keys: Tensor, skip: Tensor,
    block_size: int, stochastic: bool, starts: list[int] | None = None,
) -> None:  # fmt: skip
    """Update the parameters and their 8-bit moments in place; the contract is the package's."""
    if skip.item():
        return
    weights, weight_dtypes = float_addresses("a parameter", params)
    gradients, gradient_dtypes = float_addresses("a gradient", grads)
    _rows, where = table(
        weights, gradients,
        addresses("m_codes", m_codes, torch.uint8), addresses("m_absmax", m_absmax, torch.float32),
        addresses("v_codes", v_codes, torch.uint8), addresses("v_absmax", v_absmax, torch.float32),
        counts(params), weight_dtypes, gradient_dtypes, starts or [0] * len(params),
    )  # fmt: skip
    library.call("adamw8", where, len(params), *_arrays(scalars, keys), block_size, stochastic)


def adamw32_(
    library: Library, params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor],
    scalars: Tensor, keys: Tensor, skip: Tensor, stochastic: bool, starts: list[int] | None = None,
) -> None:  # fmt: skip
    """Update the parameters and their float32 moments in place; the contract is the package's."""
    if skip.item():
        return
    weights, weight_dtypes = float_addresses("a parameter", params)
    gradients, gradient_dtypes = float_addresses("a gradient", grads)
    _rows, where = table(
        weights, gradients, addresses("m", m, torch.float32), addresses("v", v, torch.float32),
        counts(params), weight_dtypes, gradient_dtypes, starts or [0] * len(params),
    )  # fmt: skip
    library.call("adamw32", where, len(params), *_arrays(scalars, keys), stochastic)
