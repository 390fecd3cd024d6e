"""One AdamW step in plain PyTorch: the definition of the mathematics and of its 8-bit form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lisa_kernels.ops.blockwise8.reference import dequantize, quantize
from lisa_kernels.ops.random_bits import random_key, random_words, round_to_bfloat16, weight_bits

# Elements worked on at a time; a multiple of every block size, so that temporaries stay small and blocks whole.
CHUNK = 1 << 20


class Hyper(NamedTuple):
    """Run-time values of one step; `weight_decay` is decoupled and `eps` stands outside the square root."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def bias_corrections(step: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """Return float32 0-d (1 − β₁ᵗ, √(1 − β₂ᵗ)), computed in float64: at t = 1 float32 would lose four digits."""
    t = step.to(torch.float64)
    # Filled on the device: `torch.tensor` would copy from the host and wait.
    first = 1.0 - torch.pow(torch.full((), beta1, dtype=torch.float64, device=step.device), t)
    second = 1.0 - torch.pow(torch.full((), beta2, dtype=torch.float64, device=step.device), t)
    return first.to(torch.float32), second.sqrt().to(torch.float32)


def square_root(value: Tensor) -> Tensor:
    """Return the correctly rounded root of float32, as IEEE, CUDA and the kernels have it.

    torch's builds with MKL are off by one in the last place for a sixth of all roots; through float64 the rounding is
    right, because no float32's root comes that close to the middle of two others.
    """
    return value.to(torch.float64).sqrt().to(torch.float32) if value.device.type == "cpu" else value.sqrt()


def adamw_update(
    weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, corrections: tuple[Tensor, Tensor], hyper: Hyper
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the new float32 (weight, m, v); decay comes first, as in `torch.optim.AdamW`."""
    correction1, root_correction2 = corrections
    m = m * hyper.beta1 + grad * (1.0 - hyper.beta1)
    v = v * hyper.beta2 + (grad * grad) * (1.0 - hyper.beta2)
    denominator = square_root(v) / root_correction2 + hyper.eps
    weight = weight * (1.0 - hyper.lr * hyper.weight_decay) - (m / denominator) * (hyper.lr / correction1)
    return weight, m, v


def _write_weight(param: Tensor, old: Tensor, new: Tensor, skip: Tensor, bits16: Tensor | None) -> None:
    if param.dtype == torch.bfloat16 and bits16 is not None:
        param.copy_(torch.where(skip, old, round_to_bfloat16(new, bits16)))
    else:
        param.copy_(torch.where(skip, old, new.to(param.dtype)))


def adamw8_(
    param: Tensor, grad: Tensor, m_codes: Tensor, m_absmax: Tensor, v_codes: Tensor, v_absmax: Tensor,
    step: Tensor, clock: Tensor, skip: Tensor, grad_scale: Tensor, hyper: Hyper,
    block_size: int, stochastic: bool, seed: int, parameter: int,
) -> None:  # fmt: skip
    """Update flat `param` [n] and its 8-bit moments in place, chunk by chunk; see the contract in the package."""
    corrections = bias_corrections(step, hyper.beta1, hyper.beta2)
    key = random_key(seed, parameter, clock)
    for start in range(0, param.numel(), CHUNK):
        span = slice(start, min(start + CHUNK, param.numel()))
        blocks = slice(start // block_size, -(-span.stop // block_size))
        first, second = random_words(key, start, span.stop - start) if stochastic else (None, None)
        m = dequantize(m_codes[span], m_absmax[blocks], True, block_size)
        v = dequantize(v_codes[span], v_absmax[blocks], False, block_size)
        g = grad[span].to(torch.float32) * grad_scale
        weight, m, v = adamw_update(param[span].to(torch.float32), g, m, v, corrections, hyper)
        new_m = quantize(m, True, block_size, None if first is None else first >> 12)
        new_v = quantize(v, False, block_size, None if second is None else second >> 12)
        bits16 = None if first is None or second is None else weight_bits(first, second)
        _write_weight(param[span], param[span], weight, skip, bits16)
        for old, new in ((m_codes[span], new_m[0]), (m_absmax[blocks], new_m[1]),
                         (v_codes[span], new_v[0]), (v_absmax[blocks], new_v[1])):  # fmt: skip
            old.copy_(torch.where(skip, old, new))


def adamw32_(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Tensor, clock: Tensor, skip: Tensor, grad_scale: Tensor,
    hyper: Hyper, stochastic: bool, seed: int, parameter: int,
) -> None:  # fmt: skip
    """Update flat `param` [n] and its float32 moments [n] in place: the path of small and 1-D tensors."""
    corrections = bias_corrections(step, hyper.beta1, hyper.beta2)
    key = random_key(seed, parameter, clock)
    for start in range(0, param.numel(), CHUNK):
        span = slice(start, min(start + CHUNK, param.numel()))
        bits16 = None
        if stochastic and param.dtype == torch.bfloat16:
            bits16 = weight_bits(*random_words(key, start, span.stop - start))
        g = grad[span].to(torch.float32) * grad_scale
        weight, new_m, new_v = adamw_update(param[span].to(torch.float32), g, m[span], v[span], corrections, hyper)
        _write_weight(param[span], param[span], weight, skip, bits16)
        m[span].copy_(torch.where(skip, m[span], new_m))
        v[span].copy_(torch.where(skip, v[span], new_v))
