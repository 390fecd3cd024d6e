"""The AdamW step on CPUs in C++: one pass per block, bit for bit what the reference defines.

The scalars are computed by the reference's own torch expressions, so that they round as they do there; the tensors'
arithmetic is in `csrc/kernels.cpp`.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lisa_kernels import native
from lisa_kernels.native import DTYPE_CODES, Library, Scalars, Stream, pointer
from lisa_kernels.ops.adamw8.reference import Hyper, bias_corrections

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef


@lru_cache(maxsize=64)
def _step_scalars(step: int, lr: float, beta1: float, beta2: float) -> tuple[float, float]:
    """Return (lr / (1 − β₁ᵗ), √(1 − β₂ᵗ)); every parameter of a group asks for the same."""
    correction1, root_correction2 = bias_corrections(torch.tensor(step), beta1, beta2)
    return float(lr / correction1), float(root_correction2)


def _scalars(step: Tensor, grad_scale: Tensor, hyper: Hyper) -> Scalars:
    step_size, root_correction2 = _step_scalars(int(step.item()), hyper.lr, hyper.beta1, hyper.beta2)
    return Scalars(
        hyper.beta1, 1.0 - hyper.beta1, hyper.beta2, 1.0 - hyper.beta2, hyper.eps,
        1.0 - hyper.lr * hyper.weight_decay, step_size, root_correction2, float(grad_scale.item()),
    )  # fmt: skip


def adamw8_(
    library: Library, param: Tensor, grad: Tensor, m_codes: Tensor, m_absmax: Tensor, v_codes: Tensor, v_absmax: Tensor,
    step: Tensor, clock: Tensor, skip: Tensor, grad_scale: Tensor, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, block_size: int, stochastic: bool, seed: int, parameter: int,
) -> None:  # fmt: skip
    """Update `param` and its 8-bit moments in place; the contract is the package's."""
    if skip.item():
        return
    scalars = _scalars(step, grad_scale, Hyper(lr, beta1, beta2, eps, weight_decay))
    library.call(
        "adamw8",
        pointer("the parameter", param, param.dtype), pointer("the gradient", grad, grad.dtype),
        pointer("m_codes", m_codes, torch.uint8), pointer("m_absmax", m_absmax, torch.float32),
        pointer("v_codes", v_codes, torch.uint8), pointer("v_absmax", v_absmax, torch.float32),
        param.numel(), block_size, scalars, Stream(seed, parameter, int(clock.item())),
        DTYPE_CODES[param.dtype], DTYPE_CODES[grad.dtype], stochastic,
    )  # fmt: skip


def adamw32_(
    library: Library, param: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Tensor, clock: Tensor, skip: Tensor,
    grad_scale: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    stochastic: bool, seed: int, parameter: int,
) -> None:  # fmt: skip
    """Update `param` and its float32 moments in place; the contract is the package's."""
    if skip.item():
        return
    scalars = _scalars(step, grad_scale, Hyper(lr, beta1, beta2, eps, weight_decay))
    library.call(
        "adamw32",
        pointer("the parameter", param, param.dtype), pointer("the gradient", grad, grad.dtype),
        pointer("m", m, torch.float32), pointer("v", v, torch.float32),
        param.numel(), scalars, Stream(seed, parameter, int(clock.item())),
        DTYPE_CODES[param.dtype], DTYPE_CODES[grad.dtype], stochastic,
    )  # fmt: skip


def register(adamw8_op: CustomOpDef, adamw32_op: CustomOpDef) -> None:
    """Run the ops on CPU tensors through the compiled library; without one they keep their definition."""
    library = native.load()
    if library is not None:
        adamw8_op.register_kernel("cpu", partial(adamw8_, library))
        adamw32_op.register_kernel("cpu", partial(adamw32_, library))
