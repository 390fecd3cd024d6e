"""The 8-bit codec on CPUs in C++, bit for bit what the reference defines."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lisa_kernels import native
from lisa_kernels.native import Library, pointer

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef


def quantize(
    library: Library, values: Tensor, signed: bool, block_size: int, key: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (codes uint8 [n], absmax float32 [blocks]) of float32 `values` [n]; the contract is the package's."""
    codes = torch.empty_like(values, dtype=torch.uint8)
    absmax = values.new_empty((-(-values.numel() // block_size),))
    library.call(
        "quantize_blockwise", pointer("values", values, torch.float32), codes.data_ptr(), absmax.data_ptr(),
        values.numel(), block_size, signed, key is not None, 0 if key is None else int(key.item()),
    )  # fmt: skip
    return codes, absmax


def dequantize(library: Library, codes: Tensor, absmax: Tensor, signed: bool, block_size: int) -> Tensor:
    """Return float32 [n] of uint8 `codes` [n] and float32 `absmax` [blocks]; the contract is the package's."""
    codes, absmax = codes.contiguous(), absmax.contiguous()
    values = torch.empty_like(codes, dtype=torch.float32)
    library.call(
        "dequantize_blockwise", pointer("codes", codes, torch.uint8), pointer("absmax", absmax, torch.float32),
        values.data_ptr(), codes.numel(), block_size, signed,
    )  # fmt: skip
    return values


def register(quantize_op: CustomOpDef, dequantize_op: CustomOpDef) -> None:
    """Run the ops on CPU tensors through the compiled library; without one they keep their definition."""
    library = native.load()
    if library is not None:
        quantize_op.register_kernel("cpu", partial(quantize, library))
        dequantize_op.register_kernel("cpu", partial(dequantize, library))
