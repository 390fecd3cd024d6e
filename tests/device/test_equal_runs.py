"""Equal runs end with equal bits, also where one of them was killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama

from device.training import METHODS, batch, train
from lisa_kernels import attach

RESUMED = ["lisa-always", "owlore-low-rank", "owlore-page", "badam-sampled", "galore", "full"]
STEPS = 5


@pytest.mark.parametrize("method", RESUMED)
def test_equal_runs_have_equal_bits(method: str) -> None:
    """Twice the same, whatever order the device works in."""
    one, other = (train("llama", METHODS[method], "cuda", torch.bfloat16) for _ in range(2))
    assert one.losses == other.losses
    assert all(torch.equal(value, other.after[name]) for name, value in one.after.items())


def steps(model: Any, opt: Any, numbers: range) -> None:
    for number in numbers:
        model(**batch("cuda", number)).loss.backward()
        opt.step()
        opt.zero_grad()


def attached(method: str) -> tuple[Any, Any]:
    model = llama().to("cuda", torch.bfloat16)
    return model, attach(model, METHODS[method], lr=1e-2, calibration=[batch("cuda", 99)], max_grad_norm=1.0, seed=0)


@pytest.mark.parametrize("method", RESUMED)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(method: str, tmp_path: Path) -> None:
    """Weights and state go to the host between two steps, and into a new model and optimizer."""
    model, opt = attached(method)
    steps(model, opt, range(STEPS))
    whole = opt.detach().state_dict()
    model, opt = attached(method)
    steps(model, opt, range(3))
    torch.save((model.state_dict(), opt.state_dict()), tmp_path / "saved")
    del model, opt
    weights, state = torch.load(tmp_path / "saved", map_location="cpu", weights_only=False)
    model, opt = attached(method)
    model.load_state_dict(weights)
    opt.load_state_dict(state)
    steps(model, opt, range(3, STEPS))
    resumed = opt.detach().state_dict()
    assert all(torch.equal(value.cpu(), resumed[name].cpu()) for name, value in whole.items())
