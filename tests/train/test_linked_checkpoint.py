"""Checkpoints of a run whose masters are files: what does not train is linked, and loads as any model does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families import gpt2, llama, tokens, train
from torch import Tensor
from transformers import AutoModelForCausalLM

from lisa_kernels import LISA, GaLore, InputError, LoRA, OwLore, attach
from lisa_kernels.methods import Method
from lisa_kernels.train import linked_checkpoint
from lisa_kernels.train.linked_checkpoint import REST, is_linked, load_linked, save_model

METHODS: dict[str, Method] = {
    "owlore": OwLore(active_layers=1, period=2, rank=4, scores="uniform"),
    "lisa": LISA(active_layers=1, period=2, embeddings="frozen"),
    "lora": LoRA(rank=4),
    "tied": GaLore(rank=4, embeddings="low-rank"),
    "gpt2": OwLore(active_layers=1, period=2, rank=4, scores="uniform", embeddings="frozen"),
}


def made(name: str) -> Any:
    return (gpt2() if name == "gpt2" else llama(tied=name == "tied")).to(torch.bfloat16)


def attached(name: str, masters: Path | None) -> tuple[Any, Any]:
    model = made(name)
    return model, attach(model, METHODS[name], lr=3e-3, seed=1, resting="nf4", masters=masters)


def values(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


SELDOM = [pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "owlore"]


@pytest.mark.parametrize("name", ["owlore", *SELDOM])
def test_a_linked_checkpoint_is_the_model(name: str, tmp_path: Path) -> None:
    """For transformers, and for a model attached alike; later steps change nothing in it."""
    model, optimizer = attached(name, tmp_path / "masters")
    for step in range(5):
        train(model, optimizer, tokens(1, 6, seed=step))
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved", optimizer)
    wanted = values(model)
    links = [path for path in (tmp_path / "saved").glob("*.weight.safetensors") if path.stat().st_nlink == 2]
    # A block has seven matrices (of GPT-2 four); one of three trains.
    assert len(links) == {"owlore": 14, "lisa": 14 + 2, "lora": 2, "tied": 0, "gpt2": 8}[name]
    assert is_linked(tmp_path / "saved") == bool(links)
    for step in range(5, 9):
        train(model, optimizer, tokens(1, 6, seed=step))
    optimizer.detach()
    loaded = values(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16))
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(value, loaded[key]) for key, value in wanted.items())
    if links:
        other, _ = attached(name, None)
        load_linked(other, tmp_path / "saved")
        assert all(torch.equal(value, wanted[key]) for key, value in values(other).items())


def test_a_disk_without_links_has_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = attached("owlore", tmp_path / "masters")

    def link(path: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(linked_checkpoint.os, "link", link)
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved", optimizer)
    files = list((tmp_path / "saved").glob("*.weight.safetensors"))
    assert len(files) == 14
    assert {path.stat().st_nlink for path in files} == {1}
    load_linked(made("owlore"), tmp_path / "saved")


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    model, optimizer = attached("owlore", tmp_path / "masters")
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved", optimizer)
    index = tmp_path / "saved" / linked_checkpoint.INDEX
    places = json.loads(index.read_text())["weight_map"]
    first = min(name for name, file in places.items() if file != REST)
    index.write_text(json.dumps({"weight_map": {name: file for name, file in places.items() if name != first}}))
    other, _ = attached("owlore", None)
    before = values(other)
    with pytest.raises(InputError, match=f"lacks {first}; resume from another checkpoint"):
        load_linked(other, tmp_path / "saved")
    assert all(torch.equal(value, before[key]) for key, value in values(other).items())


def test_what_transformers_would_name_otherwise_is_saved_as_it_has_it(tmp_path: Path) -> None:
    model, optimizer = attached("owlore", tmp_path / "masters")
    save = model.save_pretrained

    def renamed(folder: Path, state_dict: Any = None) -> None:
        if state_dict is not None:
            state_dict = {f"other.{name}": value for name, value in state_dict.items()}
        save(folder, state_dict=state_dict)

    model.save_pretrained = renamed
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved", optimizer)
    assert not is_linked(tmp_path / "saved")
    assert not (tmp_path / "saved" / REST).exists()
    assert "model.safetensors" in os.listdir(tmp_path / "saved")
