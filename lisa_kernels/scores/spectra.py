"""Scores that need the weights only: Hill alpha of the spectra, and the norm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lisa_kernels.distributed import whole
from lisa_kernels.errors import InputError
from lisa_kernels.progress import progress_bar
from lisa_kernels.scores.matrices import block_matrices, check_blocks, fp32_rows


@torch.no_grad()
def hill_alphas(blocks: Sequence[nn.Module], device: torch.device | None = None) -> list[float]:
    """Return, per block, the mean Hill alpha of its matrices: the smaller, the heavier the tail of the spectra.

    With the n eigenvalues of WᵀW that can differ from zero ascending and k = n // 2, a matrix has
    alpha = 1 + k / (sum of ln λ_i over the k largest - k ln λ_(n-k)); infinite for a flat spectrum. Matrices of one
    row or column and matrices of zeros have no tail and are left out. device: where each matrix comes to for it, one at
    a time, in float32; None: where it is.
    """
    check_blocks(blocks)
    alphas: list[float] = []
    with progress_bar("layer scores", blocks) as advance:
        for index, block in enumerate(blocks):
            each = (_hill_alpha(matrix, device) for matrix in block_matrices(block).values())
            found = [alpha for alpha in each if alpha is not None]
            if not found:
                raise InputError(
                    f"block {index} ({type(block).__name__}) has no weight matrix with a spectrum to score."
                )
            alphas.append(math.fsum(found) / len(found))
            advance()
    return alphas


def _hill_alpha(matrix: Tensor, device: torch.device | None) -> float | None:
    """Return the Hill alpha of one matrix, or None where it has none."""
    tail = min(matrix.shape) // 2
    weight = whole(matrix).to(device).float()
    if not tail or not bool(weight.any()):
        return None
    if not bool(weight.isfinite().all()):
        raise InputError("a weight matrix holds values that are not finite: its spectrum is not defined.")
    # Zero eigenvalues, of a matrix of low rank, would have an infinite logarithm.
    singular = torch.linalg.svdvals(weight).double().clamp_min(torch.finfo(torch.float32).tiny)
    logs = 2.0 * singular.log()
    excess = float((logs[:tail] - logs[tail]).sum())
    return 1.0 + tail / excess if excess > 0 else math.inf


@torch.no_grad()
def weight_norms(blocks: Sequence[nn.Module]) -> list[float]:
    """Return, per block, the Frobenius norm over all its weight matrices together."""
    check_blocks(blocks)
    return [
        math.sqrt(
            math.fsum(
                rows.square().sum().item() for matrix in block_matrices(block).values() for rows in fp32_rows(matrix)
            )
        )
        for block in blocks
    ]
