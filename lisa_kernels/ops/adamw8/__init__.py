"""One AdamW step on 8-bit (or, for small tensors, 32-bit) moments: contract, checks and `torch.library` schema.

Both operations take lists, one entry per parameter, and update all of them at once: one pass on CPUs, one launch per
combination of dtypes on GPUs. Mutated: params and moments. Nothing here waits for the device: what changes from step
to step comes as tensors there. Of k parameters of up to 2⁶³ elements each:

    params, grads   float32, bfloat16 or float16, of equal shapes; dtypes may differ between and within the lists
    scalars         float32 [k, 8], rows of `Scalars`, as `step_inputs` makes them
    keys            int64 [k], the keys of the random numbers (`random_bits.keys_at`), as it makes them too
    skip            bool 0-d; true leaves everything untouched
    starts          of parts of larger tensors the index of their first element there, a multiple of the block size,
                    or of 4 with 32-bit moments: parts then become what the whole would. None: 0 for all
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops import library
from lisa_kernels.ops.adamw8 import cpu_kernel, reference
from lisa_kernels.ops.adamw8.reference import Hyper, Scalars, step_scalars
from lisa_kernels.ops.blockwise8 import block_count, check_block_size

__all__ = [
    "FLOAT_DTYPES", "FOUR", "Hyper", "Scalars", "adamw8_", "adamw8_op", "adamw32_", "adamw32_op", "step_inputs",
    "step_scalars",
]  # fmt: skip

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Elements that share a hash of random numbers.
FOUR = 4

_TRITON = "lisa_kernels.ops.adamw8.triton_kernel"


def _fake(*arguments: object) -> None:
    return None


# For callers whose tensors are checked and dense already; the functions below are for all others.
adamw8_op = library.define(
    "adamw8_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] m_codes, Tensor(c!)[] m_absmax, Tensor(d!)[] v_codes, "
    "Tensor(e!)[] v_absmax, Tensor scalars, Tensor keys, Tensor skip, int block_size, bool stochastic, "
    "int[]? starts=None) -> ()",
    reference.adamw8_, _fake,
)  # fmt: skip
adamw32_op = library.define(
    "adamw32_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] m, Tensor(c!)[] v, Tensor scalars, Tensor keys, "
    "Tensor skip, bool stochastic, int[]? starts=None) -> ()",
    reference.adamw32_, _fake,
)  # fmt: skip
library.implement_cpu("adamw8_", cpu_kernel.adamw8_)
library.implement_cpu("adamw32_", cpu_kernel.adamw32_)
library.implement_triton("adamw8_", _TRITON)
library.implement_triton("adamw32_", _TRITON)


def _fake_inputs(
    steps: list[Tensor], grad_scale: Tensor, bases: Tensor, clock: Tensor, hyper: list[float], ends: list[int]
) -> tuple[Tensor, Tensor]:
    return grad_scale.new_empty((len(steps), len(Scalars._fields))), bases.new_empty((len(steps),))


_step_inputs_op = library.define(
    "step_inputs(Tensor[] steps, Tensor grad_scale, Tensor bases, Tensor clock, float[] hyper, int[] ends) "
    "-> (Tensor, Tensor)",
    reference.step_inputs, _fake_inputs,
)  # fmt: skip
library.implement_cpu("step_inputs", cpu_kernel.step_inputs)


def step_inputs(
    steps: list[Tensor], groups: Sequence[tuple[Hyper, int]], grad_scale: Tensor, bases: Tensor, clock: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the operations below take as `scalars` and `keys`, on the device of the given tensors.

    steps: k counts of updates, int64 0-d each, this one included; groups: hyper-parameters, and how many parameters
    end with the group; grad_scale: float32 0-d; bases: int64 [k] of `random_bits.key_base`; clock: int64 0-d, the step
    that keys the random numbers.
    """
    hyper = [value for each, _ in groups for value in each]
    ends = [end for _, end in groups]
    if any(isinstance(value, Tensor) for value in hyper):
        # A rate on the device is read where it is, so that a captured CUDA graph sees its new values.
        return reference.step_inputs(steps, grad_scale, bases, clock, hyper, ends)
    result: tuple[Tensor, Tensor] = _step_inputs_op(steps, grad_scale, bases, clock, hyper, ends)
    return result


def _check(
    params: Sequence[Tensor], grads: Sequence[Tensor], scalars: Tensor, keys: Tensor, starts: list[int] | None,
    unit: int,
) -> None:  # fmt: skip
    for param, grad in zip(params, grads, strict=True):
        if param.dtype not in FLOAT_DTYPES or grad.dtype not in FLOAT_DTYPES:
            raise InputError(
                f"a parameter is {param.dtype} and its gradient {grad.dtype}; float32, bfloat16 or float16 is wanted."
            )
        if param.shape != grad.shape or param.device != grad.device or grad.layout is not torch.strided:
            raise InputError(
                f"a gradient is {grad.layout} {list(grad.shape)} on {grad.device}; its parameter is dense "
                f"{list(param.shape)} on {param.device}."
            )
    k = len(params)
    if scalars.shape != (k, len(Scalars._fields)) or keys.shape != (k,):
        raise InputError(
            f"scalars are {list(scalars.shape)} and keys {list(keys.shape)}; {k} parameters need "
            f"[{k}, {len(Scalars._fields)}] and [{k}]."
        )
    if starts is not None and (len(starts) != k or any(start < 0 or start % unit for start in starts)):
        raise InputError(f"starts are {starts}; {k} multiples of {unit} are wanted.")


def _dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]


def _write_back(params: Sequence[Tensor], dense: Sequence[Tensor]) -> None:
    for param, target in zip(params, dense):
        if target is not param:
            param.copy_(target)


def adamw8_(
    params: Sequence[Tensor], grads: Sequence[Tensor], m_codes: list[Tensor], m_absmax: list[Tensor],
    v_codes: list[Tensor], v_absmax: list[Tensor], *, scalars: Tensor, keys: Tensor, skip: Tensor,
    block_size: int = 256, stochastic: bool = True, starts: list[int] | None = None,
) -> None:  # fmt: skip
    """Take one AdamW step on each parameter [n], its moments held as codes uint8 [n] and absmax float32 [blocks]."""
    check_block_size(block_size)
    _check(params, grads, scalars, keys, starts, block_size)
    for name, codes, absmax in (("m", m_codes, m_absmax), ("v", v_codes, v_absmax)):
        for param, code, scale in zip(params, codes, absmax, strict=True):
            n = param.numel()
            if code.dtype != torch.uint8 or code.numel() != n or scale.numel() != block_count(n, block_size):
                raise InputError(
                    f"{name} has {code.numel()} {code.dtype} codes and absmax {list(scale.shape)}; a parameter of "
                    f"{n} elements needs as many uint8 codes and absmax [{block_count(n, block_size)}]."
                )
    dense = _dense(params)
    options = (block_size, stochastic, starts)
    adamw8_op(dense, _dense(grads), m_codes, m_absmax, v_codes, v_absmax, scalars, keys, skip, *options)
    _write_back(params, dense)


def adamw32_(
    params: Sequence[Tensor], grads: Sequence[Tensor], m: list[Tensor], v: list[Tensor], *,
    scalars: Tensor, keys: Tensor, skip: Tensor, stochastic: bool = True, starts: list[int] | None = None,
) -> None:  # fmt: skip
    """Take one AdamW step on each parameter [n], its moments held as float32 [n]."""
    _check(params, grads, scalars, keys, starts, FOUR)
    for param, *moments in zip(params, m, v, strict=True):
        if any(moment.dtype != torch.float32 or moment.numel() != param.numel() for moment in moments):
            raise InputError(
                f"moments are {[(moment.dtype, moment.numel()) for moment in moments]}; a parameter of "
                f"{param.numel()} elements needs as many of float32."
            )
    dense = _dense(params)
    adamw32_op(dense, _dense(grads), m, v, scalars, keys, skip, stochastic, starts)
    _write_back(params, dense)
