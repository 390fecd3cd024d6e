"""How the values of torch's operations on a device are found on the CPU, where that is not the operation itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# They make or change tensors and no values.
VALUELESS = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::empty_like", "aten::new_empty",
    "aten::new_empty_strided", "aten::empty_permuted", "aten::resize_", "aten::set_.source_Storage_storage_offset",
    "aten::set_.source_Storage", "aten::set_.source_Tensor", "aten::set_data", "aten::detach_", "aten::record_stream",
    "aten::is_pinned", "aten::_pin_memory", "aten::sym_size", "aten::_local_scalar_dense",
}  # fmt: skip
# Their libraries want a real device: the meta device says what shapes they return.
FACTORIZATIONS = {
    "aten::linalg_qr", "aten::linalg_cholesky_ex", "aten::linalg_solve_triangular", "aten::_linalg_eigh",
    "aten::_linalg_svd", "aten::linalg_inv_ex", "aten::_linalg_solve_ex", "aten::linalg_lu_factor_ex", "aten::geqrf",
    "aten::linalg_householder_product",
}  # fmt: skip
# The shapes that they return depend on values, so that the host waits for these.
WAITING = {
    "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::repeat_interleave.Tensor", "aten::bincount", "aten::equal", "aten::is_nonzero",
    "aten::allclose", "aten::_is_any_true", "aten::_is_all_true",
}  # fmt: skip
# They wait where an index is a mask.
INDEXED = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"}


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return left.to(dtype) @ right.to(dtype)


def _float(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float()


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, deviation = aten.native_layer_norm.default(x.float(), shape, _float(weight), _float(bias), eps)
    return y.to(x.dtype), mean, deviation


def _layer_norm_backward(
    dy: Tensor, x: Tensor, shape: Sequence[int], mean: Tensor, deviation: Tensor, weight: Any, bias: Any, mask: Any
) -> tuple[Tensor | None, ...]:
    found = aten.native_layer_norm_backward.default(
        dy.float(), x.float(), shape, mean.float(), deviation.float(), _float(weight), _float(bias), mask
    )
    return tuple(None if grad is None else grad.to(x.dtype) for grad in found)


def _softmax(x: Tensor, dim: int, to_float: bool) -> Tensor:
    result: Tensor = aten._softmax.default(x.float() if to_float else x, dim, False)
    return result


def _softmax_backward(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    result: Tensor = aten._softmax_backward_data.default(dy, y, dim, dy.dtype)
    return result.to(dtype)


# What the CPU does not have, or keeps in other dtypes than a device does.
STAND_INS = {
    "aten::mm.dtype": _product,
    "aten::bmm.dtype": _product,
    "aten::native_layer_norm": _layer_norm,
    "aten::native_layer_norm_backward": _layer_norm_backward,
    "aten::_softmax": _softmax,
    "aten::_softmax_backward_data": _softmax_backward,
}
