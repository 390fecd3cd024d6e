"""Scores by the name of their kind."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.progress import progress_bar
from lisa_kernels.scores import CALIBRATED_KINDS, SCORE_KINDS, compute_scores, gradients, outlier, spectra
from lisa_kernels.scores.gradients import gradient_norms
from lisa_kernels.scores.outlier import outlier_ratios
from lisa_kernels.scores.spectra import hill_alphas, weight_norms

from .tiny_models import llama, padded_batches


@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_each_kind_gives_its_own_scores(kind: str) -> None:
    model, blocks = llama()
    batches = padded_batches()
    expected = {
        "outlier": lambda: outlier_ratios(model, blocks, batches, 3.0),
        "hill": lambda: hill_alphas(blocks),
        "weight-norm": lambda: weight_norms(blocks),
        "gradient-norm": lambda: gradient_norms(model, blocks, batches),
        "uniform": lambda: [1.0] * 3,
    }[kind]()
    assert compute_scores(kind, model, blocks, iter(batches), threshold=3.0) == expected


@pytest.mark.parametrize("kind", ["outlier", "gradient-norm", "hill"])
def test_how_far_it_is_is_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of batches, and of blocks where there are no batches; on a terminal."""
    told = io.StringIO()
    terminal = Console(file=told, force_terminal=True, width=100)
    for module in (gradients, outlier, spectra):
        monkeypatch.setattr(module, "progress_bar", lambda *given: progress_bar(*given, terminal))
    model, blocks = llama()
    batches = padded_batches()
    compute_scores(kind, model, blocks, batches)
    parts = len(blocks) if kind == "hill" else len(batches)
    assert f"{parts}/{parts}" in told.getvalue()


@pytest.mark.parametrize("kind", CALIBRATED_KINDS)
def test_missing_batches_are_refused_by_the_kinds_that_need_them(kind: str) -> None:
    model, blocks = llama()
    with pytest.raises(InputError, match="need calibration batches"):
        compute_scores(kind, model, blocks)
    with pytest.raises(InputError, match="no calibration batch"):
        compute_scores(kind, model, blocks, [])


@pytest.mark.parametrize("kind", [kind for kind in SCORE_KINDS if kind not in CALIBRATED_KINDS])
def test_the_other_kinds_need_no_batches(kind: str) -> None:
    model, blocks = llama()
    assert all(math.isfinite(score) for score in compute_scores(kind, model, blocks))


def test_a_misspelt_kind_is_refused_with_the_nearest() -> None:
    model, blocks = llama()
    with pytest.raises(InputError, match="did you mean 'outlier'"):
        compute_scores("outliers", model, blocks)


def test_a_score_that_is_not_finite_is_refused() -> None:
    block = nn.Linear(4, 4)
    block.weight.data = torch.eye(4)
    with pytest.raises(InputError, match="hill score of block 0 is inf"):
        compute_scores("hill", block, [block])
