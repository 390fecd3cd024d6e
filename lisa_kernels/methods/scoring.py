"""Layer scores of a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lisa_kernels.layers import Visits, find_blocks
from lisa_kernels.scores import compute_scores


def layer_scores(
    model: nn.Module, kind: str = "outlier", calibration: Iterable[Mapping[str, Tensor]] | None = None, *,
    threshold: float = 13.0, blocks: str | None = None, device: torch.device | str | None = None,
) -> list[float]:  # fmt: skip
    """Return one score per decoder block, in order.

    kind: "outlier" (share of entries with ‖X_j‖₂·|W_ij| above `threshold` times their mean, arXiv 2405.18380), "hill"
    (tail exponent of the spectrum), "weight-norm", "gradient-norm" or "uniform". calibration: batches that
    `model(**batch)` takes, needed for "outlier" and "gradient-norm". device: where, of a model in host memory, the
    forwards for "outlier" compute, one block's weights at a time, and the spectra for "hill", one matrix; None: where
    the model is. Raises InputError.
    """
    _, found = find_blocks(model, blocks)
    return scores_of(kind, model, found, calibration, None if device is None else torch.device(device), threshold)


def scores_of(
    kind: str, model: nn.Module, blocks: Sequence[nn.Module], calibration: Iterable[Mapping[str, Tensor]] | None = None,
    device: torch.device | None = None, threshold: float = 13.0,
) -> list[float]:  # fmt: skip
    """Return the scores of these blocks, see `layer_scores`."""
    with Visits(model, blocks, device if kind == "outlier" else None, recomputed=False):
        return compute_scores(kind, model, blocks, calibration, threshold, device)
