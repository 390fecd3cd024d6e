"""Fold a low-rank slot into its weight: contract, checks and `torch.library` schema."""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops.fold import cpu_kernel, reference
from lisa_kernels.ops.library import triton_kernel, triton_present


@torch.library.custom_op("lisa_kernels::fold_", mutates_args=("weight",))
def _fold(
    weight: Tensor, left: Tensor, right: Tensor, decay: Tensor, clock: Tensor, stochastic: bool, seed: int,
    parameter: int,
) -> None:  # fmt: skip
    reference.fold_(weight, left, right, decay, clock, stochastic, seed, parameter)


@_fold.register_fake
def _(
    weight: Tensor, left: Tensor, right: Tensor, decay: Tensor, clock: Tensor, stochastic: bool, seed: int,
    parameter: int,
) -> None:  # fmt: skip
    return None


cpu_kernel.register(_fold)
if triton_present():
    _fold.register_kernel("cuda", triton_kernel("lisa_kernels.ops.fold.triton_kernel", "fold_"))


def fold_(
    weight: Tensor, left: Tensor, right: Tensor, *, decay: Tensor, clock: Tensor,
    stochastic: bool = True, seed: int = 0, parameter: int = 0,
) -> None:  # fmt: skip
    """Replace `weight` [m, n] by decay · weight + leftᵀ · right, in float32, rounded once to the weight's dtype.

    left: [r, m] and right: [r, n], any float dtype: the slot B and the basis P of a weight stored [m, n], or P and B of
    one stored transposed (GPT-2's Conv1D). decay: float32 0-d tensor, 1 − lr·wd. A bfloat16 weight is rounded
    stochastically with random numbers keyed by (seed, clock, parameter, element).
    """
    m, n = weight.shape
    if left.shape[1:] != (m,) or right.shape[1:] != (n,) or left.shape[0] != right.shape[0]:
        raise InputError(
            f"cannot fold {list(left.shape)} and {list(right.shape)} into a weight {list(weight.shape)}; "
            f"[r, {m}] and [r, {n}] are wanted."
        )
    _fold(weight, left, right, decay, clock, stochastic, seed, parameter)
