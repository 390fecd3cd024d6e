"""Masters in files beside a device: what is learnt there is what masters in host memory learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama

from lisa_kernels import attach
from lisa_kernels.layers import RestingLinear
from lisa_kernels.methods import Method

from .training import METHODS, at_rest, batch, train


@pytest.mark.order("late")
@pytest.mark.parametrize("name", ["owlore-resting", "owlore-on-masters", "lora-resting"])
def test_masters_in_files_learn_what_those_in_memory_do(name: str, tmp_path: Path) -> None:
    method: Method = METHODS[name]
    runs = [
        train(lambda: llama(tied=False), method, "cuda", torch.bfloat16, masters=masters, **at_rest(name, "nf4"))
        for masters in ("host", tmp_path / "masters")
    ]
    assert runs[0].losses == runs[1].losses
    for key, value in runs[0].after.items():
        assert torch.equal(value, runs[1].after[key]), key
    assert not (tmp_path / "masters").exists()


@pytest.mark.order("late")
@pytest.mark.parametrize("name", ["owlore-resting", "owlore-on-masters", "lisa-resting", "lora-resting"])
def test_matrices_that_go_to_the_device_one_by_one_learn_what_a_model_does_that_moves_whole(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attached there, the host never has the codes of two layers; masters and table stay on it."""
    ends = []
    for device in (None, "cuda"):
        held: list[int] = []
        model: Any = llama(tied=False).to(torch.bfloat16)
        made = RestingLinear.__init__

        def init(layer: Any, *args: Any, made: Any = made, model: Any = model, held: Any = held, **more: Any) -> None:
            made(layer, *args, **more)
            others = [each for each in model.modules() if isinstance(each, RestingLinear)]
            held.append(sum(each.codes.device.type == "cpu" for each in others))

        with monkeypatch.context() as patch:
            patch.setattr(RestingLinear, "__init__", init)
            opt = attach(model, METHODS[name], lr=1e-2, seed=0, scores=[1.0] * 3, device=device, **at_rest(name, "nf4"))
        assert max(held) == 0 or device is None
        model.to("cuda")
        assert model.model.embed_tokens.weight.device.type == ("cuda" if name == "lisa-resting" else "cpu")
        for seed in range(4):
            model(**batch("cuda", seed)).loss.backward()
            opt.step()
            opt.zero_grad()
        ends.append({key: value.cpu() for key, value in opt.detach().state_dict().items()})
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
