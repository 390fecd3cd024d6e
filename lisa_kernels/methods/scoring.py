"""Layer scores of a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lisa_kernels.layers import find_blocks
from lisa_kernels.scores import compute_scores


def layer_scores(
    model: nn.Module, kind: str = "outlier", calibration: Iterable[Mapping[str, Tensor]] | None = None, *,
    threshold: float = 13.0, blocks: str | None = None,
) -> list[float]:  # fmt: skip
    """Return one score per decoder block, in order.

    kind: "outlier" (share of entries with ‖X_j‖₂·|W_ij| above `threshold` times their mean, arXiv 2405.18380), "hill"
    (tail exponent of the spectrum), "weight-norm", "gradient-norm" or "uniform". calibration: batches that
    `model(**batch)` takes, needed for "outlier" and "gradient-norm". Raises InputError.
    """
    _, found = find_blocks(model, blocks)
    return compute_scores(kind, model, found, calibration, threshold)
