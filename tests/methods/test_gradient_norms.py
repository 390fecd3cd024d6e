"""Gradient norms of a period: their means, of finite ones only."""

from __future__ import annotations

import math

import pytest
import torch

from lisa_kernels.methods.gradient_norms import add_norm, mean_norms

ONE = torch.ones(())


def test_norms_of_a_layer_are_averaged() -> None:
    """Over all its gradients at a time, with the scale of a GradScaler taken back."""
    seen = add_norm(None, [torch.tensor([3.0]), torch.tensor([[4.0]])], ONE)
    seen = add_norm(seen, [torch.tensor([20.0])], ONE / 2)
    assert mean_norms({4: seen}) == {4: pytest.approx(7.5)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_does_not_count(value: float) -> None:
    """As of a step that is skipped; a layer without any other has no mean."""
    bad = add_norm(None, [torch.tensor([value])], ONE)
    good = add_norm(bad, [torch.tensor([2.0])], ONE)
    assert mean_norms({0: bad, 1: good}) == {1: 2.0}
    assert mean_norms({}) == {}
