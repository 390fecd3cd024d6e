"""Plans of flows in groups: they equal the real run, and say what paging and groups are worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lisa_kernels import InputError, TimestepExperts, plan
from lisa_kernels.flow.path import flow_loss
from lisa_kernels.flow.transformer import FlowShape, FlowTransformer
from lisa_kernels.plan.flow import FlowWorkload, plan_flow, rehearse_flow
from lisa_kernels.plan.tracker import StorageTracker

SHAPE = FlowShape(1, 8, 8, 10, hidden=64, layers=16, heads=2)
BATCH = 16


def model_of(groups: int) -> FlowTransformer:
    return FlowTransformer(SHAPE, TimestepExperts(groups=groups).intervals())


def loss(model: nn.Module, times: Tensor) -> Tensor:
    device = times.device
    images, labels = torch.zeros(BATCH, 1, 8, 8, device=device), torch.zeros(BATCH, dtype=torch.int64, device=device)
    return flow_loss(model, images, times, labels, torch.ones(BATCH, 1, 8, 8, device=device))


def planned(groups: int, **method: Any) -> Any:
    with torch.device("meta"):
        model = model_of(groups)
    return plan_flow(model, loss, FlowWorkload("small", TimestepExperts(groups=groups, **method), BATCH))


@pytest.mark.parametrize("groups", [1, 4])
def test_a_plan_equals_the_real_run(groups: int) -> None:
    """Peak, the peak of every phase, and every storage's size, category and place; moments stay on the device."""
    workload = FlowWorkload("small", TimestepExperts(groups=groups, retired_state="keep"), BATCH)
    tracker = StorageTracker("cpu")
    real = rehearse_flow(model_of(groups), loss, workload, None, tracker)
    with torch.device("meta"):
        empty = model_of(groups)
    trace = rehearse_flow(empty, loss, workload, None, StorageTracker("meta"))
    assert trace.peak_bytes == real.peak_bytes
    assert trace.phases() == real.phases()


def test_groups_take_a_quarter_of_what_trains_and_pages_of_the_weights_too() -> None:
    """Each category at the peak of four groups, against the dense twin."""
    dense, experts, paged = planned(1), planned(4), planned(4, resting_weights="page")
    for category, share in (("gradients", 0.3), ("saved activations", 0.3)):
        assert max_of(experts, category) <= share * max_of(dense, category)
    moments = [max_of(made, "pages") + max_of(made, "optimizer state") for made in (dense, experts)]
    assert moments[1] <= 0.3 * moments[0]
    assert max_of(experts, "weights") == max_of(dense, "weights")
    # The group that runs, the one that comes, and what is shared.
    assert max_of(paged, "weights") <= 0.4 * max_of(dense, "weights")
    assert paged.peak_bytes < experts.peak_bytes < dense.peak_bytes


def max_of(made: Any, category: str) -> int:
    """Return the most bytes of a category alive at once."""
    most = alive = 0
    for event in made.trace.events:
        if event.category == category:
            alive += event.bytes
            most = max(most, alive)
    return most


def test_a_model_with_values_is_not_planned() -> None:
    """Its weights would be in memory already."""
    with pytest.raises(InputError, match="the model has values"):
        plan_flow(model_of(2), loss, FlowWorkload("small", TimestepExperts(groups=2)))
    with pytest.raises(InputError, match="batch_size is 0"):
        FlowWorkload("small", TimestepExperts(), batch_size=0)


def test_groups_of_a_language_model_are_not_planned() -> None:
    """Its forward is told no time: the sentence names the function that plans flows."""
    with pytest.raises(InputError, match="plan it with plan_flow"):
        plan("preset:tiny", TimestepExperts())
