"""How large gradients are: the largest magnitude and the sum of squares of many tensors, in one pass over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops import library
from lisa_kernels.ops.grad_norm import cpu_kernel, reference

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _fake(grads: list[Tensor], squares: bool) -> Tensor:
    return grads[0].new_empty((2,), dtype=torch.float64)


_grad_norm = library.define("grad_norm(Tensor[] grads, bool squares) -> Tensor", reference.grad_norm, _fake)
library.implement_cpu("grad_norm", cpu_kernel.grad_norm)
library.implement_triton("grad_norm", "lisa_kernels.ops.grad_norm.triton_kernel")


def grad_norm(grads: Sequence[Tensor], squares: bool = True) -> Tensor:
    """Return float64 [2] on the gradients' device: the largest magnitude, NaN if there is one, and the sum of squares.

    grads: at least one tensor, float32, bfloat16 or float16, all on one device. Without `squares` the sum is 0 and not
    computed. The largest magnitude is exact. The sum errs by at most 24 · 2⁻²⁴ of itself on GPUs, where tiles are
    summed in float32 and their sums in float64, and as float64 sums do on CPUs. Both are the same in every run and for
    every number of threads.
    """
    if not grads:
        raise InputError("there are no gradients to measure; at least one tensor is wanted.")
    for grad in grads:
        if grad.dtype not in FLOAT_DTYPES or grad.layout is not torch.strided or grad.device != grads[0].device:
            raise InputError(
                f"a gradient is {grad.layout} {grad.dtype} on {grad.device}; dense float32, bfloat16 or float16 on "
                f"{grads[0].device} is wanted."
            )
    dense = [grad if grad.is_contiguous() else grad.contiguous() for grad in grads]
    result: Tensor = _grad_norm(dense, squares)
    return result
