"""The AdamW step on CPUs in C++: one pass per block over all tensors, bit for bit what the reference defines."""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.native import Library, addresses, counts, float_addresses, pointer, table


def _arrays(scalars: Tensor, keys: Tensor) -> tuple[int, int]:
    return pointer("the table of scalars", scalars, torch.float32), pointer("the list of keys", keys, torch.int64)


def adamw8_(
    library: Library, params: list[Tensor], grads: list[Tensor], m_codes: list[Tensor], m_absmax: list[Tensor],
    v_codes: list[Tensor], v_absmax: list[Tensor], scalars: Tensor, keys: Tensor, skip: Tensor,
    block_size: int, stochastic: bool,
) -> None:  # fmt: skip
    """Update the parameters and their 8-bit moments in place; the contract is the package's."""
    if skip.item():
        return
    weights, weight_dtypes = float_addresses("a parameter", params)
    gradients, gradient_dtypes = float_addresses("a gradient", grads)
    rows = table(
        weights, gradients,
        addresses("m_codes", m_codes, torch.uint8), addresses("m_absmax", m_absmax, torch.float32),
        addresses("v_codes", v_codes, torch.uint8), addresses("v_absmax", v_absmax, torch.float32),
        counts(params), weight_dtypes, gradient_dtypes,
    )  # fmt: skip
    library.call("adamw8", rows.ctypes.data, len(params), *_arrays(scalars, keys), block_size, stochastic)


def adamw32_(
    library: Library, params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor],
    scalars: Tensor, keys: Tensor, skip: Tensor, stochastic: bool,
) -> None:  # fmt: skip
    """Update the parameters and their float32 moments in place; the contract is the package's."""
    if skip.item():
        return
    weights, weight_dtypes = float_addresses("a parameter", params)
    gradients, gradient_dtypes = float_addresses("a gradient", grads)
    rows = table(
        weights, gradients, addresses("m", m, torch.float32), addresses("v", v, torch.float32),
        counts(params), weight_dtypes, gradient_dtypes,
    )  # fmt: skip
    library.call("adamw32", rows.ctypes.data, len(params), *_arrays(scalars, keys), stochastic)
