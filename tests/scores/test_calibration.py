"""Calibration leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from families import llava, tokens
from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.scores.calibration import calibration_inputs, evaluation_mode

from .tiny_models import llama


def test_each_module_returns_to_its_own_mode() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()

    def fail_while_evaluating() -> None:
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_while_evaluating()
    assert [module.training for module in model.modules()] == [True, True, False]


def test_what_is_around_a_language_model_caches_nothing_either() -> None:
    """Of whose forward `use_cache` is no argument."""
    model = llava()
    with evaluation_mode(model):
        assert model(**tokens()).past_key_values is None
    assert model.eval()(**tokens()).past_key_values is not None


def test_a_model_with_a_cache_runs_without_it_and_a_batch_may_insist() -> None:
    model, _ = llama()
    ids = torch.zeros(1, 2, dtype=torch.long)
    inputs = list(calibration_inputs(model, [{"input_ids": ids}, {"input_ids": ids, "use_cache": ids}]))
    assert inputs[0]["use_cache"] is False
    assert inputs[1]["use_cache"] is ids
    assert "use_cache" not in next(calibration_inputs(nn.Linear(1, 1), [{"input": ids}]))


def test_no_batch_is_refused() -> None:
    with pytest.raises(InputError, match="no calibration batch"):
        list(calibration_inputs(nn.Linear(1, 1), iter([])))


def test_a_batch_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(InputError, match="batch 0 is a Tensor"):
        list(calibration_inputs(nn.Linear(1, 1), [torch.zeros(1)]))
