"""Block-wise 8-bit codec of optimizer moments: contract, checks and `torch.library` schema.

`kind="m"` is the signed E4M3 form of first moments, `kind="v"` the unsigned E5M3 form of second moments, which never
stores a positive value as code 0. Rounding is stochastic when a key is given and to nearest otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops.blockwise8 import cpu_kernel, reference
from lisa_kernels.ops.library import triton_kernel, triton_present
from lisa_kernels.ops.random_bits import moment_bits, random_words

MIN_BLOCK_SIZE = 16
MAX_BLOCK_SIZE = 65536


def check_block_size(block_size: int) -> None:
    """Refuse a block size that is not a power of two in range."""
    if not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE or block_size & (block_size - 1):
        raise InputError(
            f"block_size is {block_size}; it must be a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE} "
            "(256 is usual)."
        )


def block_count(elements: int, block_size: int) -> int:
    """Return how many blocks hold that many elements."""
    return -(-elements // block_size)


@torch.library.custom_op("lisa_kernels::quantize_blockwise", mutates_args=())
def _quantize(values: Tensor, signed: bool, block_size: int, key: Tensor | None) -> tuple[Tensor, Tensor]:
    bits = None
    if key is not None:
        bits = moment_bits(random_words(key, 0, values.numel()), signed)
    return reference.quantize(values, signed, block_size, bits)


@_quantize.register_fake
def _(values: Tensor, signed: bool, block_size: int, key: Tensor | None) -> tuple[Tensor, Tensor]:
    blocks = block_count(values.numel(), block_size)
    return values.new_empty(values.shape, dtype=torch.uint8), values.new_empty((blocks,))


@torch.library.custom_op("lisa_kernels::dequantize_blockwise", mutates_args=())
def _dequantize(codes: Tensor, absmax: Tensor, signed: bool, block_size: int) -> Tensor:
    return reference.dequantize(codes, absmax, signed, block_size)


@_dequantize.register_fake
def _(codes: Tensor, absmax: Tensor, signed: bool, block_size: int) -> Tensor:
    return absmax.new_empty(codes.shape)


cpu_kernel.register(_quantize, _dequantize)
if triton_present():
    _TRITON = "lisa_kernels.ops.blockwise8.triton_kernel"
    _quantize.register_kernel("cuda", triton_kernel(_TRITON, "quantize"))
    _dequantize.register_kernel("cuda", triton_kernel(_TRITON, "dequantize"))


def _is_signed(kind: str) -> bool:
    if kind not in ("m", "v"):
        raise InputError(f"kind is {kind!r}; it must be 'm' (signed first moment) or 'v' (unsigned second moment).")
    return kind == "m"


def quantize_blockwise(
    values: Tensor, kind: str, block_size: int = 256, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Encode a flat tensor of moments in 8 bits per value.

    values: float32 [n], finite, contiguous, non-negative for kind "v". key: int64 0-d of `random_key` for stochastic
    rounding, None for nearest. Returns codes uint8 [n] and absmax float32 [ceil(n / block_size)].
    """
    signed = _is_signed(kind)
    check_block_size(block_size)
    if values.dtype != torch.float32 or values.dim() != 1 or not values.is_contiguous():
        raise InputError(f"values are {values.dtype} {list(values.shape)}; float32 [n], contiguous, is wanted.")
    codes, absmax = _quantize(values, signed, block_size, key)
    return codes, absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, kind: str, block_size: int = 256) -> Tensor:
    """Decode what `quantize_blockwise` wrote: codes uint8 [n], absmax float32 [blocks] → float32 [n]."""
    signed = _is_signed(kind)
    check_block_size(block_size)
    if codes.dtype != torch.uint8 or codes.dim() != 1:
        raise InputError(f"codes are {codes.dtype} {list(codes.shape)}; uint8 [n] is wanted.")
    if absmax.shape != (block_count(codes.numel(), block_size),):
        wanted = block_count(codes.numel(), block_size)
        raise InputError(
            f"absmax has shape {list(absmax.shape)}; {codes.numel()} codes in blocks of {block_size} need [{wanted}]."
        )
    values: Tensor = _dequantize(codes, absmax, signed, block_size)
    return values
