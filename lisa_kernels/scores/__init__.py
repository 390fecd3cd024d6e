"""One number per decoder block that a sampler may use as a weight; blocks are given, never searched for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.scores.gradients import gradient_norms
from lisa_kernels.scores.matrices import check_blocks
from lisa_kernels.scores.outlier import outlier_ratios
from lisa_kernels.scores.spectra import hill_alphas, weight_norms

__all__ = ["CALIBRATED_KINDS", "SCORE_KINDS", "compute_scores"]

SCORE_KINDS = ("outlier", "hill", "weight-norm", "gradient-norm", "uniform")
CALIBRATED_KINDS = ("outlier", "gradient-norm")


def compute_scores(
    kind: str,
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    threshold: float = 13.0,
    device: torch.device | None = None,
) -> list[float]:
    """Return one finite score per block.

    batches: for the `CALIBRATED_KINDS`. threshold: of the outlier ratio. device: of the spectra, see `hill_alphas`.
    """
    if kind not in SCORE_KINDS:
        raise unknown_name("kind of score", kind, SCORE_KINDS)
    if kind in CALIBRATED_KINDS:
        if batches is None:
            raise InputError(f"scores of kind {kind!r} need calibration batches, and none were given.")
        if kind == "outlier":
            scores = outlier_ratios(model, blocks, batches, threshold)
        else:
            scores = gradient_norms(model, blocks, batches)
    elif kind == "hill":
        scores = hill_alphas(blocks, device)
    elif kind == "weight-norm":
        scores = weight_norms(blocks)
    else:
        check_blocks(blocks)
        scores = [1.0] * len(blocks)
    for block, score in enumerate(scores):
        if not math.isfinite(score):
            raise InputError(f"the {kind} score of block {block} is {score}: use another kind of score.")
    return scores
