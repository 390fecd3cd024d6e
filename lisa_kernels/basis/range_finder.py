"""Bases of the row space of a gradient: a randomized range finder first, warm power iterations later.

Source of the range finder: Halko, Martinsson, Tropp (2011), algorithms 4.3 and 5.1; the warm iteration is one step of
subspace iteration from the previous basis.
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 16


def orthonormal_rows(rows: Tensor) -> Tensor:
    """Return float32 [r, n] with orthonormal rows that span the rows of `rows` [r, n]; needs r ≤ n."""
    q: Tensor = torch.linalg.qr(rows.to(torch.float32).t())[0]
    return q.t().contiguous()


def _normal(rows: int, columns: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return float32 normal numbers, drawn where the generator lives, so that every device gets the same."""
    drawn = torch.randn(rows, columns, generator=generator, device=generator.device, dtype=torch.float32)
    return drawn.to(device)


def random_basis(rank: int, columns: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return float32 [rank, columns] with orthonormal rows in random directions."""
    return orthonormal_rows(_normal(rank, columns, generator, device))


def first_basis(gradient: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return float32 [rank, n] with orthonormal rows that capture the leading row space of `gradient` float32 [m, n].

    Sketches with `OVERSAMPLING` extra rows, takes one power pass, and keeps the leading directions of the sketch.
    """
    m, n = gradient.shape
    width = min(rank + OVERSAMPLING, m, n)
    rows = orthonormal_rows(_normal(width, m, generator, gradient.device) @ gradient)
    rows = orthonormal_rows(orthonormal_rows(rows @ gradient.t()) @ gradient)
    # The leading directions within the oversampled space: eigenvectors of the small Gram matrix of P Gᵀ.
    projected = rows @ gradient.t()
    # Scaled to one, so that its square neither overflows nor vanishes.
    projected = projected / projected.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    directions: Tensor = torch.linalg.eigh(projected @ projected.t())[1]
    return (directions.flip(1)[:, :rank].t() @ rows).contiguous()


def refresh_basis(gradient: Tensor, basis: Tensor) -> Tensor:
    """Return the basis after one warm power iteration, float32 [r, n]: P ← orth((P Gᵀ) G) from the previous P.

    The inner product is orthonormalised first, so that weak directions are not lost to rounding. Rows of the result are
    ordered and signed to stay close to the old ones.
    """
    left = orthonormal_rows(basis.to(torch.float32) @ gradient.t())
    rows = orthonormal_rows(left @ gradient)
    # Procrustes: among all bases of the new space the one nearest the old rows, so that transport moves little.
    u, _, vh = torch.linalg.svd(rows @ basis.to(torch.float32).t())
    turn: Tensor = (u @ vh).t()
    return (turn @ rows).contiguous()
