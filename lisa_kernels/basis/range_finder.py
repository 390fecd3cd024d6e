"""Bases of the row space of a gradient: a randomized range finder first, warm power iterations later.

Source of the range finder: Halko, Martinsson, Tropp (2011), algorithms 4.4 and 5.1; the warm iteration is one step of
subspace iteration from the previous basis and a few random rows. Nothing here waits for the device: a gradient that is
not finite, or zero throughout, is noticed there and changes nothing.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from lisa_kernels.basis.gradients import FactoredGradient, Gradient, SharedGradient, cheaper, lift, project
from lisa_kernels.basis.orthonormal import (
    filled_rows,
    leading_rows,
    nearest_turn,
    orthonormal_rows,
    whitened_rows,
)
from lisa_kernels.basis.random_rows import RandomRows

OVERSAMPLING = 16
# Each multiplies the sketch by GᵀG; two hold 0.99 of the exact energy on spectra as flat as k^-0.6.
FIRST_PASSES = 2


class Found(NamedTuple):
    """A basis float32 [r, n], and whether (bool 0-d, on the device) the gradient had a say in it."""

    basis: Tensor
    usable: Tensor


def random_basis(rank: int, columns: int, source: RandomRows, device: torch.device) -> Tensor:
    """Return float32 [rank, columns] with orthonormal rows in random directions."""
    return orthonormal_rows(source.draw(rank, columns, device))


def _power_pass(gradient: Gradient, rows: Tensor) -> Tensor:
    """Return Q G float32 [k, n], where Q [k, m] has orthonormal rows that span those of `rows` · Gᵀ.

    Without Q the weak directions of (rows Gᵀ) G would be lost to rounding.
    """
    return lift(whitened_rows(filled_rows(project(rows, gradient))), gradient)


def _with_others(rows: Tensor, m: int, source: RandomRows) -> Tensor:
    """Return [k, n]: `rows` [r, n] and, where the matrix has room for them, `OVERSAMPLING` random ones of length 1."""
    rank, n = rows.shape
    others = min(rank + OVERSAMPLING, m, n) - rank
    return torch.cat([rows, source.draw(others, n, rows.device)])


def _affordable(gradient: Gradient, rows: Tensor, passes: int) -> Gradient:
    if isinstance(gradient, SharedGradient) and isinstance(gradient.part, FactoredGradient):
        return dataclasses.replace(gradient, part=cheaper(gradient.part, 2 * passes * len(rows)))
    return cheaper(gradient, 2 * passes * len(rows)) if isinstance(gradient, FactoredGradient) else gradient


def find_first(gradient: Gradient, rank: int, source: RandomRows) -> Found:
    """Return the basis of the leading row space of `gradient`, or a random one where it has no say."""
    m, n = gradient.shape
    start = source.draw(rank, n, gradient.device)
    rows = _with_others(start, m, source)
    gradient = _affordable(gradient, rows, FIRST_PASSES)
    rows = _power_pass(gradient, rows)
    for _ in range(FIRST_PASSES - 1):
        rows = _power_pass(gradient, whitened_rows(filled_rows(rows)))
    usable = _has_say(rows)
    found = orthonormal_rows(torch.where(usable, leading_rows(rows, rank), start), start)
    # A basis that is not finite would reach the weight with the first fold, whatever the slot holds.
    sound = torch.isfinite(found).all()
    return Found(torch.where(sound, found, torch.eye(rank, n, device=found.device)), usable & sound)


def find_refreshed(gradient: Gradient, basis: Tensor, source: RandomRows) -> Found:
    """Return the basis after one power pass from `basis` float32 [r, n], or that one where the gradient has no say.

    Random rows go along, which find within one pass what the old rows do not see at all. The new rows are turned to lie
    as near to the old ones as they can, so that transport moves little.
    """
    rows = _with_others(basis, gradient.shape[0], source)
    rows = _power_pass(_affordable(gradient, rows, 1), rows)
    found = orthonormal_rows(leading_rows(rows, len(basis)), basis)
    usable = _has_say(rows) & torch.isfinite(found).all()
    return Found(torch.where(usable, nearest_turn(basis, found) @ found, basis), usable)


def _has_say(rows: Tensor) -> Tensor:
    """Return bool 0-d: what a power pass gave is finite, as it is only of a finite gradient, and not all zero."""
    return torch.isfinite(rows).all() & (rows != 0).any()


def first_basis(gradient: Gradient, rank: int, source: RandomRows) -> Tensor:
    """Return float32 [rank, n] with orthonormal rows that capture the leading row space of `gradient` [m, n].

    Rows are ordered by energy, as far as neighbours differ. A gradient that is zero, or has a NaN or an infinity, gives
    random directions.
    """
    return find_first(gradient, rank, source).basis


def refresh_basis(gradient: Gradient, basis: Tensor, source: RandomRows | None = None) -> Tensor:
    """Return the basis after one warm power iteration, float32 [r, n]: P ← orth((P Gᵀ) G) from the previous P.

    The rows lie as near to the old ones as a basis of the new space can. A gradient that is zero, or has a NaN or an
    infinity, gives the old basis back. Without a source the random rows that go along are always the same.
    """
    source = RandomRows(0) if source is None else source
    return find_refreshed(gradient, basis.to(torch.float32), source).basis
