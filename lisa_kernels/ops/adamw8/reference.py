"""One AdamW step in plain PyTorch: the definition of the mathematics and of its 8-bit form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lisa_kernels.ops.blockwise8.reference import decode, quantize, scales
from lisa_kernels.ops.random_bits import STOCHASTIC_ROUNDINGS, keys_at, moment_bits, random_words, weight_bits
from lisa_kernels.ops.tiles import to_device

# Elements worked on at a time; a multiple of every block size, so that temporaries stay small and blocks whole.
CHUNK = 1 << 20
# The root of the smallest normal float32: a smaller ε would leave 0 / 0 where a gradient has always been 0, and on GPUs
# a division by the approximate root of a subnormal second moment, which is 0.
SMALLEST_EPS = 2.0**-63


class Hyper(NamedTuple):
    """Hyper-parameters of one step, each a number or a 0-d tensor; decay is decoupled, `eps` outside the root."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float | Tensor
    weight_decay: float | Tensor


class Scalars(NamedTuple):
    """What a step needs besides its tensors, as a row of the table of `step_scalars` holds it: float32 0-d each.

    A step works on moments divided by 1 − β, as sums of gradients: with carry = β / (1 − β), m / (1 − β₁) grows from
    carry₁ · m to carry₁ · m + g, and v / (1 − β₂) to carry₂ · v + g². That spares two products per element; what the
    sums are too large by is in `step_size` and `eps`, as both bias corrections are.
    """

    carry1: Tensor
    one_minus_beta1: Tensor
    carry2: Tensor
    one_minus_beta2: Tensor
    eps: Tensor
    decay: Tensor
    step_size: Tensor
    grad_scale: Tensor


def step_scalars(steps: Tensor, hyper: Hyper, grad_scale: Tensor) -> Tensor:
    """Return float32 [k, 8], a row of `Scalars` for each of the update counts `steps` (int64 [k], this one included).

    Computed in float64 and rounded once: at step 1 float32 would lose four digits of 1 − β₂. Nothing waits for the
    device.
    """
    t = steps.to(torch.float64)
    lr, beta1, beta2, eps, weight_decay = (
        value.to(t) if isinstance(value, Tensor) else float(value) for value in hyper
    )
    rest1, rest2 = 1.0 - beta1, 1.0 - beta2
    # √((1 − β₂ᵗ) / (1 − β₂)), by which the root of the sum exceeds that of the corrected second moment.
    root = torch.rsub(torch.pow(beta2, t), 1.0).div_(rest2).sqrt_()
    step_size = root * (lr * rest1) / torch.rsub(torch.pow(beta1, t), 1.0)
    root_eps = (root * eps).clamp_min_(SMALLEST_EPS)
    decay = 1.0 - lr * weight_decay
    table = torch.empty((len(t), len(Scalars._fields)), dtype=torch.float32, device=t.device)
    columns = (beta1 / rest1, rest1, beta2 / rest2, rest2, root_eps, decay, step_size, grad_scale)
    for column, value in zip(table.unbind(1), columns):
        # Numbers are filled in on the device: `torch.tensor` would copy from the host and wait.
        column.copy_(value) if isinstance(value, Tensor) else column.fill_(value)
    return table


def step_inputs(
    steps: list[Tensor], grad_scale: Tensor, bases: Tensor, clock: Tensor, hyper: Sequence[float | Tensor],
    ends: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the scalars and keys of a step; see the contract in the package."""
    groups = [Hyper(*hyper[5 * group : 5 * group + 5]) for group in range(len(ends))]
    spans = list(pairwise([0, *ends]))
    keys = keys_at(bases, clock)
    if not any(isinstance(value, Tensor) for value in hyper):
        rates = [_rates(each) for each, (start, end) in zip(groups, spans) for _ in range(start, end)]
        host = torch.tensor(rates, dtype=torch.float64, device="cpu")
        return _all_scalars(torch.stack(steps), to_device(host, grad_scale.device), grad_scale), keys
    rows = [step_scalars(torch.stack(steps[start:end]), each, grad_scale) for each, (start, end) in zip(groups, spans)]
    return torch.cat(rows) if len(rows) > 1 else rows[0], keys


def _rates(hyper: Hyper) -> list[float]:
    """Return what `step_scalars` makes of numbers alone: a row of `Scalars`, zeros for what is not, and factors."""
    lr, beta1, beta2, eps, weight_decay = map(float, hyper)
    rest1, rest2 = 1.0 - beta1, 1.0 - beta2
    row = [beta1 / rest1, rest1, beta2 / rest2, rest2, 0.0, 1.0 - lr * weight_decay, 0.0, 0.0]
    return [*row, beta1, beta2, eps, lr * rest1]


def _all_scalars(steps: Tensor, rates: Tensor, grad_scale: Tensor) -> Tensor:
    """Return `step_scalars` of parameters of several groups; rates: float64 [k, 12], rows of `_rates`.

    The same operations on the same numbers, and so the same bits, in as few launches as one group's.
    """
    t = steps.to(torch.float64)
    beta1, beta2, eps, scaled_lr = rates[:, len(Scalars._fields) :].unbind(1)
    root = torch.rsub(torch.pow(beta2, t), 1.0).div_(rates[:, 3]).sqrt_()
    table = rates[:, : len(Scalars._fields)].to(torch.float32)
    table[:, 4].copy_((root * eps).clamp_min_(SMALLEST_EPS))
    table[:, 6].copy_(root * scaled_lr / torch.rsub(torch.pow(beta1, t), 1.0))
    table[:, 7].copy_(grad_scale)
    return table


def square_root(value: Tensor) -> Tensor:
    """Return the correctly rounded root of float32, as IEEE, CUDA and the kernels have it.

    torch's builds with MKL are off by one in the last place for a sixth of all roots; through float64 the rounding is
    right, because no float32's root comes that close to the middle of two others.
    """
    return value.to(torch.float64).sqrt().to(torch.float32) if value.device.type == "cpu" else value.sqrt()


def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a · b + c of float32 tensors, rounded once, as IEEE's fused operation has it.

    A product of two float32 is exact in float64, and the sum's error there is known exactly. An inexact sum is made
    odd in its last bit, away from the middle of two float32, so that the second rounding cannot go astray.
    """
    product, addend = a.to(torch.float64) * b.to(torch.float64), c.to(torch.float64)
    total = product + addend
    back = total - product
    rest = (product - (total - back)) + (addend - back)
    bits = total.view(torch.int64)
    towards_odd = torch.where((rest > 0) == (total > 0), 1, -1) * ((rest != 0) & (bits & 1 == 0))
    return (bits + towards_odd).view(torch.float64).to(torch.float32)


def adamw_update(
    weight: Tensor, grad: Tensor, m: Tensor, m_scale: Tensor, carried_v: Tensor, scalars: Scalars
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the new float32 (weight, m / (1 − β₁), v / (1 − β₂)) from m · m_scale and v times their carries.

    Decay comes first, as in `torch.optim.AdamW`. Each product that is added to something is rounded with the sum.
    """
    grad = grad * scalars.grad_scale
    m = multiply_add(m, m_scale, grad)
    v = multiply_add(grad, grad, carried_v)
    ratio = m / (square_root(v) + scalars.eps)
    return multiply_add(-ratio, scalars.step_size, weight * scalars.decay), m, v


def _write_weight(param: Tensor, new: Tensor, skip: Tensor, words: Tensor | None) -> None:
    if param.dtype in STOCHASTIC_ROUNDINGS and words is not None:
        new = STOCHASTIC_ROUNDINGS[param.dtype](new, weight_bits(words))
    param.copy_(torch.where(skip, param, new.to(param.dtype)))


class _Words(NamedTuple):
    """The random words of a tensor that begins at the element `start` of a whole one; key: int64 0-d."""

    key: Tensor
    start: int

    def of(self, span: slice) -> Tensor:
        """Return those of some of its elements."""
        return random_words(self.key, self.start + span.start, span.stop - span.start)


def _spans(n: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]


def adamw8_(
    params: list[Tensor], grads: list[Tensor], m_codes: list[Tensor], m_absmax: list[Tensor],
    v_codes: list[Tensor], v_absmax: list[Tensor], scalars: Tensor, keys: Tensor, skip: Tensor,
    block_size: int, stochastic: bool, starts: list[int] | None = None,
) -> None:  # fmt: skip
    """Update each parameter and its 8-bit moments in place, chunk by chunk; see the contract in the package."""
    tensors = zip(params, grads, m_codes, m_absmax, v_codes, v_absmax)
    for index, (param, grad, *state) in enumerate(tensors):
        row, words = Scalars(*scalars[index].unbind()), _Words(keys[index], starts[index] if starts else 0)
        _update8(param.view(-1), grad.view(-1), tuple(state), row, words if stochastic else None, skip, block_size)


def _update8(
    param: Tensor, grad: Tensor, state: tuple[Tensor, ...], scalars: Scalars, random: _Words | None, skip: Tensor,
    block_size: int,
) -> None:  # fmt: skip
    m_codes, m_absmax, v_codes, v_absmax = state
    for span in _spans(param.numel()):
        blocks = slice(span.start // block_size, -(-span.stop // block_size))
        count = span.stop - span.start
        words = None if random is None else random.of(span)
        m, m_scale = decode(m_codes[span], True), scales(m_absmax[blocks], block_size, count, scalars.carry1)
        v = decode(v_codes[span], False) * scales(v_absmax[blocks], block_size, count, scalars.carry2)
        given = param[span].to(torch.float32), grad[span].to(torch.float32)
        weight, m, v = adamw_update(*given, m, m_scale, v, scalars)
        _write_weight(param[span], weight, skip, words)
        for moment, codes, absmax, signed, rest in (
            (m, m_codes, m_absmax, True, scalars.one_minus_beta1),
            (v, v_codes, v_absmax, False, scalars.one_minus_beta2),
        ):
            bits20 = None if words is None else moment_bits(words, signed)
            new_codes, largest = quantize(moment, signed, block_size, bits20)
            codes[span].copy_(torch.where(skip, codes[span], new_codes))
            absmax[blocks].copy_(torch.where(skip, absmax[blocks], largest * rest))


def adamw32_(
    params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor], scalars: Tensor, keys: Tensor,
    skip: Tensor, stochastic: bool, starts: list[int] | None = None,
) -> None:  # fmt: skip
    """Update each parameter and its float32 moments in place: the path of small and 1-D tensors."""
    for index, (param, grad, old_m, old_v) in enumerate(zip(params, grads, m, v)):
        row, words = Scalars(*scalars[index].unbind()), _Words(keys[index], starts[index] if starts else 0)
        flat = param.view(-1), grad.view(-1), old_m.view(-1), old_v.view(-1)
        _update32(*flat, row, words if stochastic and param.dtype in STOCHASTIC_ROUNDINGS else None, skip)


def _update32(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, scalars: Scalars, random: _Words | None, skip: Tensor
) -> None:
    for span in _spans(param.numel()):
        words = None if random is None else random.of(span)
        given = param[span].to(torch.float32), grad[span].to(torch.float32)
        weight, new_m, new_v = adamw_update(*given, m[span], scalars.carry1, v[span] * scalars.carry2, scalars)
        _write_weight(param[span], weight, skip, words)
        m[span].copy_(torch.where(skip, m[span], new_m * scalars.one_minus_beta1))
        v[span].copy_(torch.where(skip, v[span], new_v * scalars.one_minus_beta2))
