"""Averages of weights, of each group over its own steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lisa_kernels import TimestepExperts, attach
from lisa_kernels.flow.average import AveragedGroups
from lisa_kernels.flow.path import flow_loss

from .test_transformer import flow, inputs


@pytest.mark.parametrize("resting_weights", ["keep", "page"])
def test_a_group_is_averaged_over_its_own_steps(resting_weights: str) -> None:
    """Against the formula: with decay min(d, (1 + n) / (10 + n)), n counted for each group and for what is shared."""
    model = flow(2, layers=2).train()
    average = AveragedGroups(model, model.route, 0.3, paged=resting_weights == "page")
    optimizer: Any = attach(
        model, TimestepExperts(groups=2, resting_weights=resting_weights), lr=1e-2, blocks="blocks"
    )  # fmt: skip
    wanted, counts = dict[str, torch.Tensor](), dict[str, int]()
    x, labels = inputs()
    for _ in range(7):
        group = optimizer.active_group
        flow_loss(model, x, optimizer.times(3), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, group)
        for name, weight in model.state_dict().items():
            if name.startswith("blocks") and not name.startswith(f"blocks.{group}."):
                continue
            n = counts.get(name, 0)
            counts[name] = n + 1
            kept = min(0.3, (1 + n) / (10 + n)) if n else 0.0
            wanted[name] = kept * wanted.get(name, weight) + (1 - kept) * weight
    assert set(counts.values()) == {7, 4, 3}
    found = flow(2, layers=2)
    average.copy_into(found)
    for name, weight in found.state_dict().items():
        torch.testing.assert_close(weight, wanted[name], msg=name)


def test_averages_go_on_from_their_state() -> None:
    model = flow(2, layers=2)
    first, second = (AveragedGroups(model, model.route, 0.9) for _ in range(2))
    first.update(model, 0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for param in model.parameters():
            param += 1
    ends = []
    for average in (first, second):
        average.update(model, 0)
        ends.append(flow(2, seed=3, layers=2))
        average.copy_into(ends[-1])
    assert all(torch.equal(a, b) for a, b in zip(ends[0].parameters(), ends[1].parameters()))
    assert not torch.equal(ends[0].head.linear.weight, model.head.linear.weight)
