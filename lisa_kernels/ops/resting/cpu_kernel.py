"""Weights at rest on CPUs in C++, bit for bit what the reference defines."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lisa_kernels import native
from lisa_kernels.native import DTYPE_CODES, Library, pointer
from lisa_kernels.ops.resting.reference import GROUP, RECORD

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef


def quantize(library: Library, values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return (codes, scales) of `values` [n]; the contract is the package's."""
    n, four_bits = values.numel(), kind == "nf4"
    codes = torch.empty(-(-n // 2) if four_bits else n, dtype=torch.uint8)
    scales = torch.empty(-(-n // GROUP) * RECORD, dtype=torch.uint8)
    library.call(
        "quantize_resting", pointer("the weight", values, values.dtype), codes.data_ptr(), scales.data_ptr(), n,
        DTYPE_CODES[values.dtype], four_bits,
    )  # fmt: skip
    return codes, scales


def dequantize_(library: Library, out: Tensor, codes: Tensor, scales: Tensor, kind: str) -> None:
    """Decode into `out` [n]; the contract is the package's."""
    library.call(
        "dequantize_resting", pointer("codes", codes, torch.uint8), pointer("scales", scales, torch.uint8),
        pointer("out", out, out.dtype), out.numel(), DTYPE_CODES[out.dtype], kind == "nf4",
    )  # fmt: skip


def register(quantize_op: CustomOpDef, dequantize_op: CustomOpDef) -> None:
    """Run the ops on CPU tensors through the compiled library; without one they keep their definition."""
    library = native.load()
    if library is not None:
        quantize_op.register_kernel("cpu", partial(quantize, library))
        dequantize_op.register_kernel("cpu", partial(dequantize_, library))
