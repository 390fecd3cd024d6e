"""Orthonormal rows and the turn between two bases, by matrix products and Cholesky factors alone.

A Householder QR of a few long rows is slow on GPUs, and SVDs and eigenvalues wait for the device; products do neither.
Source of the two passes: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya (2015), CholeskyQR2; here the Gram matrix is summed
in float64, so that one pass survives every condition that float32 rows can have.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Directions weaker than this come from the fill: it outweighs what rounding leaves where rows depend on each other.
TRACE = 2.0**-17
# Added to a Gram matrix of rows of up to unit length, whose rounding in float64 could else make it indefinite: fill
# that happens to lie along the rows leaves directions far weaker than TRACE. After one pass these are far stronger than
# the second ridge.
RIDGE, SECOND_RIDGE = 1e-12, 1e-14
# Each divides what is left of weaker directions by the ratio of squared singular values.
LEADING_STEPS = 5
# Newton-Schulz multiplies small singular values by 1.5 a step: 14 steps take 1/100 to 1.
POLAR_STEPS = 14


def whitened_rows(rows: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return [r, n] in the dtype of `rows` [r, n]: one pass, orthonormal to its rounding times their condition.

    Directions whose squared length is below the ridge come out shorter than 1.
    """
    wide = rows.to(torch.float64)
    gram = wide @ wide.t()
    gram.diagonal().add_(ridge)
    lower = torch.linalg.cholesky_ex(gram)[0]
    unit = torch.eye(rows.shape[0], dtype=torch.float64, device=rows.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False).to(rows.dtype)
    return inverse @ rows


def filled_rows(rows: Tensor, fill: Tensor | None = None) -> Tensor:
    """Return float32 [r, n]: `rows`, the longest at length 1, and a trace of `fill`, of unit vectors where None."""
    longest = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).amax().to(torch.float32)
    filled: Tensor = rows.to(torch.float32) / longest.clamp_min(torch.finfo(torch.float32).tiny)
    if fill is None:
        filled.diagonal().add_(TRACE)
        return filled
    return filled.add_(fill, alpha=TRACE)


def orthonormal_rows(rows: Tensor, fill: Tensor | None = None) -> Tensor:
    """Return float32 [r, n] with orthonormal rows that span the rows of `rows` [r, n]; needs r ≤ n.

    Where those have fewer than r directions above `TRACE` of the longest row, `fill` float32 [r, n] (unit vectors, if
    None) completes them. Rows that are not finite give rows that are not. Nothing here waits for the device.
    """
    return whitened_rows(whitened_rows(filled_rows(rows, fill)), SECOND_RIDGE)


def leading_rows(rows: Tensor, rank: int) -> Tensor:
    """Return float32 [rank, n]: nearly the leading right singular vectors of `rows` [k, n] times their singular values.

    Orthogonal iteration with the Gram matrix, `LEADING_STEPS` times: singular values that lie close together keep their
    common space, not their own directions.
    """
    wide = rows.to(torch.float64)
    gram = wide @ wide.t()
    turn = torch.eye(len(gram), dtype=torch.float64, device=rows.device)
    for _ in range(LEADING_STEPS):
        product = turn @ gram
        length: Tensor = torch.linalg.vector_norm(product, dim=1, keepdim=True)
        turn = whitened_rows(product / length.clamp_min(torch.finfo(torch.float64).tiny))
    return turn[:rank].to(torch.float32) @ rows


def nearest_turn(old: Tensor, new: Tensor) -> Tensor:
    """Return orthogonal float32 [r, r] T that brings T · `new` as near to `old` as a turn can; both are bases [r, n].

    It is the polar factor of old · newᵀ. Directions of the new basis that lie within half a degree of a right angle to
    the old one are near to nothing there, and take any turn that is left.
    """
    turn = (old @ new.t()).to(torch.float64)
    for _ in range(POLAR_STEPS):
        turn = torch.addmm(turn, turn @ turn.t(), turn, beta=1.5, alpha=-0.5)
    return orthonormal_rows(turn)


def deviation(basis: Tensor) -> Tensor:
    """Return float32 0-d: the largest entry of |P Pᵀ − 1|."""
    rows = basis.to(torch.float32)
    unit = torch.eye(rows.shape[0], device=rows.device, dtype=torch.float32)
    return (rows @ rows.t() - unit).abs().amax()
