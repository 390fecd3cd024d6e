"""Fold a low-rank slot into its weight: contract, checks and `torch.library` schema."""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops.fold import cpu_kernel, reference
from lisa_kernels.ops.library import triton_kernel, triton_present


@torch.library.custom_op("lisa_kernels::fold_", mutates_args=("weight", "remainder"))
def _fold(
    weight: Tensor, left: Tensor, right: Tensor, decay: Tensor, key: Tensor | None, remainder: Tensor | None = None,
    start: int = 0,
) -> None:  # fmt: skip
    reference.fold_(weight, left, right, decay, key, remainder, start)


@_fold.register_fake
def _(
    weight: Tensor, left: Tensor, right: Tensor, decay: Tensor, key: Tensor | None, remainder: Tensor | None = None,
    start: int = 0,
) -> None:  # fmt: skip
    return None


cpu_kernel.register(_fold)
if triton_present():
    _fold.register_kernel("cuda", triton_kernel("lisa_kernels.ops.fold.triton_kernel", "fold_"))


def fold_(
    weight: Tensor, left: Tensor, right: Tensor, *, decay: Tensor, key: Tensor | None = None,
    remainder: Tensor | None = None, start: int = 0,
) -> None:  # fmt: skip
    """Replace `weight` [m, n] by decay · weight + leftᵀ · right, in float32, rounded once to the weight's dtype.

    left: [r, m] and right: [r, n], any float dtype: the slot B and the basis P of a weight stored [m, n], or P and B of
    one stored transposed (GPT-2's Conv1D). decay: float32 0-d tensor, 1 − lr·wd. key: int64 0-d of `random_key`
    for the stochastic rounding of a 16-bit weight, None to round to nearest.

    remainder: int16 [m, n] beside a bfloat16 weight, mutated: together they are a float32 master weight, see
    `master_weight`; the weight is then its nearest bfloat16 and nothing is random.

    start: where the weight is some rows of a larger one, the index of its first element there, a multiple of 4: rows
    are then rounded as they are in the whole.
    """
    m, n = weight.shape
    if left.shape[1:] != (m,) or right.shape[1:] != (n,) or left.shape[0] != right.shape[0]:
        raise InputError(
            f"cannot fold {list(left.shape)} and {list(right.shape)} into a weight {list(weight.shape)}; "
            f"[r, {m}] and [r, {n}] are wanted."
        )
    if start < 0 or start % 4:
        raise InputError(f"the rows start at element {start} of the whole weight; a multiple of 4 is wanted.")
    if remainder is not None:
        check_remainder(weight, remainder)
    _fold(weight, left, right, decay, key, remainder, start)


def check_remainder(weight: Tensor, remainder: Tensor) -> None:
    """Raise InputError unless the two can be a master weight."""
    if weight.dtype != torch.bfloat16 or remainder.dtype != torch.int16 or remainder.shape != weight.shape:
        raise InputError(
            f"a remainder {remainder.dtype} {list(remainder.shape)} beside a weight {weight.dtype} "
            f"{list(weight.shape)} makes no master weight; int16 beside bfloat16 of the same shape is wanted."
        )


def master_weight(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 master that a bfloat16 weight and its int16 remainder hold; a remainder of zeros adds nothing.

    The bits of the master are those of the weight, read as float32, plus the remainder. So the remainder is the
    master's lower 16 bits, and the weight its nearest bfloat16 with ties away from zero: with ties to even, one pair
    would stand for two masters.
    """
    check_remainder(weight, remainder)
    return reference.join(weight, remainder)
