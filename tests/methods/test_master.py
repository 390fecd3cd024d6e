"""A remainder beside each active bfloat16 matrix makes its updates add up as in float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from families import gpt2, llama, tokens
from torch import Tensor

from lisa_kernels import GaLore, OwLore, attach
from lisa_kernels.errors import InputError
from lisa_kernels.methods import Method, SampledAdamW

OWLORE = OwLore(active_layers=1, period=2, rank=4, scores="uniform", embeddings="frozen", master="remainder")


def trained(model: Any, method: Method, steps: int, lr: float, rounding: str = "nearest") -> SampledAdamW:
    """Train on one batch, so that gradients all but repeat."""
    optimizer = attach(model, method, lr=lr, weight_decay=0.0, rounding=rounding)
    for _ in range(steps):
        model(**tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def movement(master: str) -> tuple[float, float]:
    """Return how far 20 small steps move float32 linears, and what share of it bfloat16 ones miss."""
    method = GaLore(rank=4, scale=1.0, embeddings="frozen", master=master)
    wide, narrow = llama(), llama().bfloat16()
    start = {name: param.detach().double() for name, param in narrow.named_parameters()}
    with torch.no_grad():
        for name, param in wide.named_parameters():
            param.copy_(start[name])
    trained(wide, method, steps=20, lr=1e-6).detach()
    optimizer = trained(narrow, method, steps=20, lr=1e-6)
    moved, missed = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    targets = dict(wide.named_parameters())
    for path, layer in optimizer._layers().items():
        name = f"{path}.weight"
        now = layer.weight.detach().double()
        if layer.remainder.numel():
            now = now + _remainder_value(layer.weight.detach(), layer.remainder)
        moved += (targets[name].detach().double() - start[name]).square().sum()
        missed += (targets[name].detach().double() - now).square().sum()
    return float(moved.sqrt()), float((missed / moved).sqrt())


def _remainder_value(weight: Tensor, remainder: Tensor) -> Tensor:
    from lisa_kernels.ops.fold import master_weight

    return master_weight(weight, remainder).double() - weight.double()


def test_updates_far_below_a_bfloat16s_step_add_up() -> None:
    """Negative control: without a remainder, rounding to nearest loses all of them."""
    moved, missed = movement("remainder")
    assert moved > 0
    assert missed < 0.2
    assert movement("none")[1] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
def test_remainders_live_while_their_layer_is_active(build: Any) -> None:
    model = build().bfloat16()
    optimizer = attach(model, OWLORE)
    for _ in range(5):
        for path, layer in optimizer._layers().items():
            assert layer.remainder.numel() == (layer.weight.numel() if layer.active else 0), path
        model(**tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any("remainder" in name for name in model.state_dict())
    optimizer.detach()
    assert not any("remainder" in name for name, _ in model.named_buffers())


def test_remainders_of_kept_layers_wait_for_their_return() -> None:
    """With "drop" a layer begins again at the nearest bfloat16."""
    method = dataclasses.replace(OWLORE, retired_state="keep")
    model = llama().bfloat16()
    optimizer = attach(model, method, lr=1e-4)
    waited = False
    for step in range(10):
        resting = {path: layer.remainder.clone() for path, layer in optimizer._layers().items() if not layer.active}
        resting = {path: before for path, before in resting.items() if before.numel()}
        model(**tokens(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for path, before in resting.items():
            assert torch.equal(optimizer._layers()[path].remainder, before)
            waited = waited or bool(before.any())
    assert waited


def test_float32_models_need_none() -> None:
    optimizer = attach(llama(), OWLORE)
    assert not any(layer.remainder.numel() for layer in optimizer._layers().values())


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    """With the state cut of its remainders, it does not."""
    whole, first, second, cut = (llama().bfloat16() for _ in range(4))
    method = GaLore(rank=4, embeddings="frozen", master="remainder")
    trained(whole, method, steps=6, lr=1e-4)
    state = trained(first, method, steps=3, lr=1e-4).state_dict()
    for model, keep in ((second, True), (cut, False)):
        model.load_state_dict(first.state_dict())
        optimizer = attach(model, method, lr=1e-4, weight_decay=0.0, rounding="nearest")
        slots = state["attachment"]["slots"]
        if not keep:
            slots = {path: {k: v for k, v in entry.items() if k != "remainder"} for path, entry in slots.items()}
        optimizer.load_state_dict({**state, "attachment": {**state["attachment"], "slots": slots}})
        for _ in range(3):
            model(**tokens()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    same = [
        all(torch.equal(one, other) for one, other in zip(whole.parameters(), model.parameters()))
        for model in (second, cut)
    ]
    assert same == [True, False]


def test_a_remainder_of_another_shape_is_refused() -> None:
    model = llama().bfloat16()
    optimizer = trained(model, OWLORE, steps=1, lr=1e-4)
    state = optimizer.state_dict()
    path, entry = next(iter(state["attachment"]["slots"].items()))
    entry["remainder"] = torch.zeros(3, 3, dtype=torch.int16)
    with pytest.raises(InputError, match=f"remainder of {path} is \\[3, 3\\]"):
        optimizer.load_state_dict(state)


def test_an_unknown_master_is_refused() -> None:
    with pytest.raises(InputError, match="master 'fp32'"):
        OwLore(master="fp32")
