"""Masters in files beside a device: what is learnt there is what masters in host memory learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import llama

from lisa_kernels.methods import Method

from .training import METHODS, at_rest, train


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
