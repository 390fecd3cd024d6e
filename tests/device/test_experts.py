"""Groups that train in turn on a device whose copies come early or late: the bits of those that stay, and no wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flow.small_flow import examples, small_flow
from torch import Tensor

from device.simulated import waits
from lisa_kernels import TimestepExperts, attach

STEPS = 8
PAGED: dict[str, tuple[dict[str, Any], str | None]] = {
    "moments": ({}, None),
    "weights too": ({"resting_weights": "page"}, None),
    "weights only": ({"retired_state": "keep", "resting_weights": "page"}, None),
    "windows": ({"resting_weights": "page"}, "host"),
    "files": ({"resting_weights": "page"}, "file"),
    "unified memory": ({"resting_weights": "page"}, "managed"),
}


def trained(settings: dict[str, Any], paging: str | None) -> tuple[dict[str, Tensor], dict[Any, Tensor], list[Any]]:
    """Return weights and moments after some steps with an evaluation among them, and what a later step waited for."""
    model = small_flow().to("cuda", torch.bfloat16)
    optimizer: Any = attach(model, TimestepExperts(groups=3, **settings), lr=3e-3, seed=3, paging=paging)
    inputs = [[part.to("cuda") for part in examples(step)] for step in range(STEPS)]
    times = torch.full((4,), 0.9, device="cuda", dtype=torch.bfloat16)
    noted: list[Any] = []
    for step, (noise, data, label) in enumerate(inputs):
        if step == 4:
            model.eval()
            with torch.no_grad():
                model(noise.bfloat16(), times, label)
            model.train()
        with waits() as seen:
            t = optimizer.times(4)
            x = torch.lerp(noise, data, t[:, None]).bfloat16()
            (model(x, t, label).float() - (data - noise)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        noted = seen
    weights = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    state = optimizer.state_dict()["state"]
    held = {(number, name): value.cpu().clone() for number, each in state.items() for name, value in each.items()}
    optimizer.detach()
    assert all(torch.equal(value.cpu(), weights[name]) for name, value in model.state_dict().items())
    assert all(param.device.type == "cuda" for param in model.parameters())
    return weights, held, noted


@pytest.mark.parametrize("name", PAGED)
def test_what_is_paged_has_the_bits_of_what_stays(name: str, tmp_path: Path) -> None:
    """Weights and moments, in every order of copies and work; with pages in host memory no later step waits."""
    settings, paging = PAGED[name]
    weights, held, noted = trained(settings, f"file:{tmp_path}" if paging == "file" else paging)
    stay = trained({"retired_state": "keep"}, None)
    assert all(torch.equal(value, stay[0][key]) for key, value in weights.items())
    assert held.keys() == stay[1].keys()
    assert all(torch.equal(value, stay[1][key]) for key, value in held.items())
    if paging in (None, "host"):
        assert not noted
