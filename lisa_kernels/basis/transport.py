"""Carry Adam's moments from one basis to the next.

Source: LDAdam (Robert et al. 2024), projection-aware moments: with Q = P_new P_oldᵀ, the first moment is linear,
and the second is rebuilt from the variance and the squared mean, as if coordinates of the old basis were uncorrelated.
Where a gradient grew of late, m̂² exceeds v̂ and the two terms may cancel; the bound of `largest_update_squared`, which
every real pair of moments keeps, then holds the second moment up.

A new direction lies in the old basis only in part, by the squared length of its row of Q. Of the rest no moment knows,
and with a second moment near zero its first updates would be several times too large, for the bias correction is over.
There the second moment begins with the square of the new gradient, as Adam's own does at its first step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def largest_update_squared(betas: tuple[float, float]) -> float:
    """Return the least upper bound of m² / v over all histories of gradients (Cauchy-Schwarz); inf where there is none.

    m = (1 − β₁) Σ β₁ⁱ gᵢ and v = (1 − β₂) Σ β₂ⁱ gᵢ² give m² ≤ v (1 − β₁)² / ((1 − β₂)(1 − β₁²/β₂)).
    """
    beta1, beta2 = betas
    if beta1 * beta1 >= beta2:
        return math.inf if beta1 else 1.0
    return (1.0 - beta1) ** 2 / ((1.0 - beta2) * (1.0 - beta1 * beta1 / beta2))


def _correction(beta: float, steps: Tensor) -> Tensor:
    """Return float32 1 − βᵗ of the shape of `steps`, at least the smallest normal number.

    Before the first update it is zero and so are the moments: any divisor gives zero back.
    """
    base = torch.full((), beta, dtype=torch.float64, device=steps.device)
    correction = torch.rsub(torch.pow(base, steps.to(torch.float64)), 1.0).to(torch.float32)
    return correction.clamp_min(torch.finfo(torch.float32).tiny)


def transport_moments(
    m: Tensor, v: Tensor, rotation: Tensor, step: Tensor, betas: tuple[float, float], gradient: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (m, v) float32 [r, k] in the new basis; the arguments are in the old one.

    rotation: Q = P_new P_oldᵀ, float32 [r, r]. step: 0-d, the number of updates that m and v hold. The statistics are
    taken with bias corrections (m̂ = m / (1 − β₁ᵗ), v̂ likewise) and given back without them. gradient: float32 [r, k] in
    the new basis, what the next update will see; entries that are not finite count as zero.
    """
    return transport_many([(m, v)], rotation[None], step[None], betas, [gradient])[0]


def transport_many(
    moments: Sequence[tuple[Tensor, Tensor]], rotations: Tensor, steps: Tensor, betas: tuple[float, float],
    gradients: Sequence[Tensor | None],
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Return what `transport_moments` does for several matrices of one rank, in few launches.

    rotations: [matrices, r, r]; steps: [matrices]. What the corrections multiply is a factor of small matrices here:
    with κ = (1 − β₂ᵗ) / (1 − β₁ᵗ)², v ← |(Q∘Q) v + κ ((Q m)² − (Q∘Q) m²)|.
    """
    correction1, correction2 = _correction(betas[0], steps), _correction(betas[1], steps)
    kappa = correction2 / correction1 / correction1
    squares = rotations * rotations
    unknown = (1.0 - squares.sum(2, keepdim=True)).clamp_min(0.0) * correction2[:, None, None]
    turns = zip(rotations.unbind(), moments)
    new_m = [rotation @ m for rotation, (m, _) in turns]
    new_v = [square @ v for square, (_, v) in zip(squares.unbind(), moments)]
    old_squares = torch._foreach_mul([m for m, _ in moments], [m for m, _ in moments])
    for v, square, part in zip(new_v, (squares * kappa[:, None, None]).unbind(), old_squares):
        v.addmm_(square, part, alpha=-1.0)
    new_squares = torch._foreach_mul(new_m, new_m)
    for v, square, factor in zip(new_v, new_squares, kappa.unbind()):
        v.addcmul_(square, factor)
    torch._foreach_abs_(new_v)
    for v, gradient, part in zip(new_v, gradients, unknown.unbind()):
        if gradient is not None:
            v.addcmul_(torch.nan_to_num(gradient, posinf=0.0, neginf=0.0).square_(), part)
    torch._foreach_div_(new_squares, largest_update_squared(betas))
    torch._foreach_maximum_(new_v, new_squares)
    return list(zip(new_m, new_v))
