"""The memory of a run of `lisa-kernels flow train`, known before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_kernels.errors import NotRehearsedError
from lisa_kernels.flow.build import new_model
from lisa_kernels.flow.data import Images
from lisa_kernels.flow.options import FlowOptions
from lisa_kernels.plan.flow_run import plan_flow_run

CPU = torch.device("cpu")
IMAGES = Images(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), ("cat", "owl"))


def planned(device: torch.device = CPU, **changed: Any) -> int:
    sizes = {"layers": 8, "hidden": 64, "heads": 2, "batch_size": 16, **changed}
    return plan_flow_run(FlowOptions("digits", Path("run"), **sizes), IMAGES, device)


@pytest.mark.slow
def test_groups_in_turn_take_less_than_all_layers_at_once() -> None:
    """Less still where the weights of those that rest are away, and more with larger batches."""
    dense, experts, paged = planned(groups=1), planned(), planned(resting_weights="page")
    assert paged < experts < 0.6 * dense
    assert planned(batch_size=32) > experts
    # What cuBLAS keeps.
    assert planned(torch.device("cuda")) > experts + 8e6


def test_averages_are_counted() -> None:
    """Weights, averages, and gradients of one group are there at once."""
    options = FlowOptions("digits", Path("run"), layers=8, hidden=64, heads=2)
    model = new_model(options, IMAGES, options.build_method().intervals())
    weights = sum(4 * param.numel() for param in model.parameters())
    group = sum(4 * param.numel() for block in model.blocks[:2] for param in block.parameters())
    assert planned(batch_size=1) > 2 * weights + group


def test_layers_that_are_copied_are_not_planned() -> None:
    with pytest.raises(NotRehearsedError, match="--backbone"):
        plan_flow_run(FlowOptions("digits", Path("run"), backbone="preset:tiny"), IMAGES, CPU)
