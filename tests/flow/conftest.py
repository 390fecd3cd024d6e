"""What the tests of flows share."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

DECIDE = (
    "backbone", "groups", "layers", "hidden", "heads", "patch", "residual_attention", "boundaries", "retired_state",
    "resting_weights", "paging", "max_grad_norm", "batch_size", "accumulate",
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def plans_of_flows_once() -> Iterator[None]:
    """Rehearse each run of the same sizes once."""
    module = importlib.import_module("lisa_kernels.plan.flow_run")
    real, made = module.plan_flow_run, {}

    def plan(options: Any, images: Any, device: Any) -> int:
        key = (*(getattr(options, name) for name in DECIDE), images.shape, len(images.names))
        if key not in made:
            made[key] = real(options, images, device)
        return int(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plan_flow_run", plan)
        yield
