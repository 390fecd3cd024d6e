"""The straight path from noise to data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lisa_kernels import InputError
from lisa_kernels.flow.path import flow_loss, interpolate


def test_the_path_begins_at_noise_and_ends_at_data() -> None:
    noise, data = torch.randn(2, 3, 1, 4, 4)
    assert torch.equal(interpolate(noise, data, torch.zeros(3)), noise)
    assert torch.equal(interpolate(noise, data, torch.ones(3)), data)


def test_the_target_is_the_path_s_derivative() -> None:
    """Of a model that knows it the loss is 0, and of one for the reversed time it is not."""
    noise, data = torch.randn(2, 3, 5, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    derivative = (interpolate(noise, data, t + 1e-3) - interpolate(noise, data, t - 1e-3)) / 2e-3

    def model(x: Tensor, times: Tensor, condition: Any) -> Tensor:
        return derivative

    assert float(flow_loss(model, data, t, None, noise)) < 1e-12
    assert float(flow_loss(model, noise, t, None, data)) > 1


@pytest.mark.parametrize("times", [torch.zeros(2), torch.zeros(3, 1)])
def test_one_time_for_each_image_is_wanted(times: Tensor) -> None:
    with pytest.raises(InputError, match="one time for each"):
        interpolate(torch.zeros(3, 4), torch.zeros(3, 4), times)
