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


def _correction(beta: float, step: Tensor) -> Tensor:
    """Return float32 0-d 1 − βᵗ, at least the smallest normal number.

    Before the first update it is zero and so are the moments: any divisor gives zero back.
    """
    base = torch.full((), beta, dtype=torch.float64, device=step.device)
    correction = (1.0 - torch.pow(base, step.to(torch.float64))).to(torch.float32)
    return correction.clamp_min(torch.finfo(torch.float32).tiny)


def transport_moments(
    m: Tensor, v: Tensor, rotation: Tensor, step: Tensor, betas: tuple[float, float], gradient: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (m, v) float32 [r, k] in the new basis; the arguments are in the old one.

    rotation: Q = P_new P_oldᵀ, float32 [r, r]. step: 0-d, the number of updates that m and v hold. The statistics are
    taken with bias corrections (m̂ = m / (1 − β₁ᵗ), v̂ likewise) and given back without them. gradient: float32 [r, k] in
    the new basis, what the next update will see; entries that are not finite count as zero.
    """
    correction1, correction2 = _correction(betas[0], step), _correction(betas[1], step)
    mean = m / correction1
    variance = v / correction2 - mean * mean
    new_mean = rotation @ mean
    squares = rotation * rotation
    new_square = (squares @ variance + new_mean * new_mean).abs()
    if gradient is not None:
        unknown = (1.0 - squares.sum(1, keepdim=True)).clamp_min(0.0)
        new_square = new_square + unknown * torch.nan_to_num(gradient, posinf=0.0, neginf=0.0).square()
    new_m, new_v = new_mean * correction1, new_square * correction2
    return new_m, torch.maximum(new_v, new_m * new_m / largest_update_squared(betas))
