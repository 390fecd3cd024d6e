"""One AdamW step on 8-bit (or, for small tensors, 32-bit) moments: contract, checks and `torch.library` schema.

Mutated: param, the moments. `step` is the parameter's own count of updates, this one included (bias correction);
`clock` the optimizer's count of steps, which keys the random numbers; `skip` true leaves everything untouched. All
three are 0-d tensors on the parameter's device, so that nothing here waits for the device. The gradient is multiplied
by `grad_scale` (float32 0-d) first. `param`, `grad`: float32, bfloat16 or float16, contiguous, same element count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops.adamw8 import cpu_kernel, reference
from lisa_kernels.ops.adamw8.reference import Hyper
from lisa_kernels.ops.blockwise8 import block_count

__all__ = ["Hyper", "adamw8_", "adamw32_"]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("lisa_kernels::adamw8_", mutates_args=("param", "m_codes", "m_absmax", "v_codes", "v_absmax"))
def _adamw8(
    param: Tensor, grad: Tensor, m_codes: Tensor, m_absmax: Tensor, v_codes: Tensor, v_absmax: Tensor,
    step: Tensor, clock: Tensor, skip: Tensor, grad_scale: Tensor, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, block_size: int, stochastic: bool, seed: int, parameter: int,
) -> None:  # fmt: skip
    hyper = Hyper(lr, beta1, beta2, eps, weight_decay)
    reference.adamw8_(
        param.view(-1), grad.view(-1), m_codes, m_absmax, v_codes, v_absmax, step, clock, skip, grad_scale, hyper,
        block_size, stochastic, seed, parameter,
    )  # fmt: skip


@torch.library.custom_op("lisa_kernels::adamw32_", mutates_args=("param", "m", "v"))
def _adamw32(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Tensor, clock: Tensor, skip: Tensor, grad_scale: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, stochastic: bool, seed: int, parameter: int,
) -> None:  # fmt: skip
    hyper = Hyper(lr, beta1, beta2, eps, weight_decay)
    reference.adamw32_(
        param.view(-1), grad.view(-1), m.view(-1), v.view(-1), step, clock, skip, grad_scale, hyper, stochastic, seed,
        parameter,
    )  # fmt: skip


@_adamw8.register_fake
def _(
    param: Tensor, grad: Tensor, m_codes: Tensor, m_absmax: Tensor, v_codes: Tensor, v_absmax: Tensor,
    step: Tensor, clock: Tensor, skip: Tensor, grad_scale: Tensor, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, block_size: int, stochastic: bool, seed: int, parameter: int,
) -> None:  # fmt: skip
    return None


@_adamw32.register_fake
def _(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Tensor, clock: Tensor, skip: Tensor, grad_scale: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, stochastic: bool, seed: int, parameter: int,
) -> None:  # fmt: skip
    return None


cpu_kernel.register(_adamw8, _adamw32)


def _check(param: Tensor, grad: Tensor) -> None:
    for name, tensor in (("parameter", param), ("gradient", grad)):
        if tensor.dtype not in FLOAT_DTYPES or tensor.is_sparse:
            raise InputError(
                f"the {name} is {tensor.layout} {tensor.dtype}; dense float32, bfloat16 or float16 is wanted."
            )
    if param.shape != grad.shape or param.device != grad.device:
        raise InputError(
            f"the gradient is {list(grad.shape)} on {grad.device}; "
            f"its parameter is {list(param.shape)} on {param.device}."
        )


def adamw8_(
    param: Tensor, grad: Tensor, m_codes: Tensor, m_absmax: Tensor, v_codes: Tensor, v_absmax: Tensor, *,
    step: Tensor, clock: Tensor, skip: Tensor, grad_scale: Tensor, hyper: Hyper,
    block_size: int = 256, stochastic: bool = True, seed: int = 0, parameter: int = 0,
) -> None:  # fmt: skip
    """Take one AdamW step on `param` [n] in place, its moments held as codes uint8 [n] and absmax float32 [blocks]."""
    _check(param, grad)
    blocks = block_count(param.numel(), block_size)
    for name, codes, absmax in (("m", m_codes, m_absmax), ("v", v_codes, v_absmax)):
        if codes.dtype != torch.uint8 or codes.numel() != param.numel() or absmax.shape != (blocks,):
            raise InputError(
                f"{name} has {codes.numel()} {codes.dtype} codes and absmax {list(absmax.shape)}; a parameter of "
                f"{param.numel()} elements needs as many uint8 codes and absmax [{blocks}]."
            )
    target = param if param.is_contiguous() else param.contiguous()
    _adamw8(
        target, grad.contiguous(), m_codes, m_absmax, v_codes, v_absmax, step, clock, skip, grad_scale, *hyper,
        block_size, stochastic, seed, parameter,
    )  # fmt: skip
    if target is not param:
        param.copy_(target)


def adamw32_(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, *, step: Tensor, clock: Tensor, skip: Tensor, grad_scale: Tensor,
    hyper: Hyper, stochastic: bool = True, seed: int = 0, parameter: int = 0,
) -> None:  # fmt: skip
    """Take one AdamW step on `param` [n] in place, its moments held as float32 [n]."""
    _check(param, grad)
    target = param if param.is_contiguous() else param.contiguous()
    _adamw32(
        target, grad.contiguous(), m, v, step, clock, skip, grad_scale, *hyper, stochastic, seed, parameter
    )  # fmt: skip
    if target is not param:
        param.copy_(target)
