"""What training in groups holds on the device beside the weights, against the same model as one group."""

from __future__ import annotations

import pytest

from lisa_kernels import TimestepExperts, attach

from .held import TrainingBytes
from .small_flow import add_gradients, small_flow

LAYERS, WIDTH = 16, 128


def held(groups: int, rows: int, retired_state: str = "page") -> TrainingBytes:
    """Return the bytes of a whole cycle, once every group has moments."""
    model = small_flow(LAYERS, WIDTH)
    optimizer = attach(model, TimestepExperts(groups=groups, retired_state=retired_state), lr=1e-3)
    found = TrainingBytes(model, optimizer)  # type: ignore[arg-type]
    for step in range(2 * groups):
        with found.counted():
            add_gradients(model, optimizer, step, rows)  # type: ignore[arg-type]
            optimizer.step()
            optimizer.zero_grad()
    return found


@pytest.mark.parametrize("rows", [8, 2048])
def test_four_groups_hold_little_more_than_a_quarter(rows: int) -> None:
    """Gradients, moments and activations together, where moments and where activations are most of it."""
    dense, experts = held(1, rows), held(4, rows)
    assert experts.most <= 0.27 * dense.most, (experts.each, dense.each)
    # Each of the three alone too, and the count sees all of them.
    assert all(0 < part <= 0.27 * whole for part, whole in zip(experts.each, dense.each)), (experts.each, dense.each)


def test_the_count_sees_what_stays() -> None:
    """Negative control: moments that all stay on the device are as many as the dense model's, and break the bound."""
    dense, kept = held(1, 8), held(4, 8, retired_state="keep")
    assert kept.each[2] > 0.9 * dense.each[2]
    assert kept.most > 0.4 * dense.most
