"""Project a full gradient on a basis: contract, checks and `torch.library` schema."""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops.library import triton_kernel, triton_present
from lisa_kernels.ops.project import reference


@torch.library.custom_op("lisa_kernels::project", mutates_args=())
def _project(basis: Tensor, gradient: Tensor) -> Tensor:
    return reference.project(basis, gradient)


@_project.register_fake
def _(basis: Tensor, gradient: Tensor) -> Tensor:
    return gradient.new_empty((basis.shape[0], gradient.shape[0]), dtype=torch.float32)


if triton_present():
    _project.register_kernel("cuda", triton_kernel("lisa_kernels.ops.project.triton_kernel", "project"))


def project(basis: Tensor, gradient: Tensor) -> Tensor:
    """Return R = P Gᵀ float32 [r, m], accumulated in float32.

    basis P: [r, n]; gradient G: [m, n], or a view of one stored [n, m]; any float dtypes. On GPUs R errs by at most
    (e + n · 2⁻²³) |P| |G|ᵀ, with e = 0 for two of one 16-bit dtype, 2⁻²³ for two of float32 and 2⁻¹⁶ for others; on
    CPUs as a product of float32 does.
    """
    if basis.dim() != 2 or gradient.dim() != 2 or basis.shape[1] != gradient.shape[1]:
        raise InputError(
            f"cannot project a gradient {list(gradient.shape)} on a basis {list(basis.shape)}; [m, n] and [r, n] with "
            "one n are wanted."
        )
    result: Tensor = _project(basis, gradient)
    return result
