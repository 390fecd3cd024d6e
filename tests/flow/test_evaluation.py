"""The loss on images that are held out."""

from __future__ import annotations

import pytest
import torch

from lisa_kernels.flow import Intervals, Times
from lisa_kernels.flow.data import Images
from lisa_kernels.flow.evaluation import held_out_loss
from lisa_kernels.flow.path import flow_loss
from lisa_kernels.flow.transformer import FlowTransformer

from .test_transformer import runs, shape, woken


def images(count: int = 40) -> Images:
    generator = torch.Generator().manual_seed(7)
    return Images(torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 3, ("cat", "owl", "eel"))


def model(*bounds: float, times: str = "uniform") -> FlowTransformer:
    torch.manual_seed(0)
    return woken(FlowTransformer(shape(layers=2 * (len(bounds) - 1)), Intervals(bounds, Times(times)))).eval()


def test_it_is_the_mean_over_times_as_training_draws_them() -> None:
    """Of groups of unequal length each by its share, against many drawn times; the same for the same seed."""
    made = model(0.0, 0.2, 1.0, times="logit-normal")
    found = held_out_loss(made, images(), seed=0)
    assert found is not None
    assert found == held_out_loss(made, images(), seed=0)
    assert found != held_out_loss(made, images(), seed=1)
    first = Times("logit-normal").cumulative(0.2)
    assert found.mean == pytest.approx(first * found.of_groups[0] + (1 - first) * found.of_groups[1])
    many = images(4000)
    shares = torch.rand(4000, generator=torch.Generator().manual_seed(3))
    drawn = made.route.intervals.times.quantiles(shares).float()
    with torch.no_grad():
        losses = flow_loss(made, many.pixels, drawn, many.labels)
    assert found.mean == pytest.approx(float(losses), rel=0.1)


def test_each_group_is_asked_once_and_training_goes_on_as_before() -> None:
    made = model(0.0, 0.5, 1.0).train()
    made.route.active = 1
    ran = runs(made)
    held_out_loss(made, images(), seed=0)
    assert ran == [0, 1, 2, 3]
    assert made.training
    assert made.route.active == 1


def test_without_images_there_is_none() -> None:
    assert held_out_loss(model(0.0, 1.0), images(0), seed=0) is None
