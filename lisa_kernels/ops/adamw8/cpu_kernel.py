"""The AdamW step on CPUs in C++: one pass per block over all tensors, bit for bit what the reference defines."""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.native import DTYPE_CODES, Library, addresses, counts, dtype_codes, pointer, table


def _arrays(scalars: Tensor, keys: Tensor) -> tuple[int, int]:
    return pointer("the scalars", scalars, torch.float32), pointer("the keys", keys, torch.int64)


def adamw8_(
    library: Library, params: list[Tensor], grads: list[Tensor], m_codes: list[Tensor], m_absmax: list[Tensor],
    v_codes: list[Tensor], v_absmax: list[Tensor], scalars: Tensor, keys: Tensor, skip: Tensor,
    block_size: int, stochastic: bool,
) -> None:  # fmt: skip
    """Update the parameters and their 8-bit moments in place; the contract is the package's."""
    if skip.item():
        return
    rows = table(
        addresses("a parameter", params, DTYPE_CODES), addresses("a gradient", grads, DTYPE_CODES),
        addresses("m_codes", m_codes, [torch.uint8]), addresses("m_absmax", m_absmax, [torch.float32]),
        addresses("v_codes", v_codes, [torch.uint8]), addresses("v_absmax", v_absmax, [torch.float32]),
        counts(params), dtype_codes(params), dtype_codes(grads),
    )  # fmt: skip
    library.call("adamw8", rows.ctypes.data, len(params), *_arrays(scalars, keys), block_size, stochastic)


def adamw32_(
    library: Library, params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor],
    scalars: Tensor, keys: Tensor, skip: Tensor, stochastic: bool,
) -> None:  # fmt: skip
    """Update the parameters and their float32 moments in place; the contract is the package's."""
    if skip.item():
        return
    rows = table(
        addresses("a parameter", params, DTYPE_CODES), addresses("a gradient", grads, DTYPE_CODES),
        addresses("m", m, [torch.float32]), addresses("v", v, [torch.float32]),
        counts(params), dtype_codes(params), dtype_codes(grads),
    )  # fmt: skip
    library.call("adamw32", rows.ctypes.data, len(params), *_arrays(scalars, keys), stochastic)
