"""Scores of a whole model, its blocks found."""

from __future__ import annotations

import pytest
from families import DECODERS, LAYERS, anatomy, t5, tokens

from lisa_kernels import InputError, layer_scores


@pytest.mark.parametrize("kind", ["outlier", "hill", "weight-norm", "gradient-norm", "uniform"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "falcon", "mixtral", "llava"])
def test_every_kind_gives_one_score_per_block(name: str, kind: str) -> None:
    """Finite numbers of at least 0, the model as it was."""
    model = DECODERS[name].make()
    before = anatomy(model)
    scores = layer_scores(model, kind, [tokens()])
    assert len(scores) == LAYERS
    assert all(0 <= score < float("inf") for score in scores)
    assert anatomy(model) == before


def test_unknown_kinds_and_missing_batches_are_refused() -> None:
    """Misspelt kinds name the nearest; calibrated kinds ask for batches; ambiguous blocks for a path."""
    model = DECODERS["llama"].make()
    with pytest.raises(InputError, match="did you mean 'outlier'"):
        layer_scores(model, "outliers", [tokens()])
    with pytest.raises(InputError, match="calibration"):
        layer_scores(model, "outlier")
    with pytest.raises(InputError, match="blocks="):
        layer_scores(t5(), "hill")
    assert len(layer_scores(t5(), "weight-norm", blocks="encoder.block")) == LAYERS
