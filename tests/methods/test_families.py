"""Every family of decoders trains by layer sampling, only where it should, and is an ordinary model afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import DECODERS, IMAGE_TOKEN, Family, anatomy, changed, llava, logits, snapshot, tokens, train

from lisa_kernels import LISA, BAdam, FullFineTune, GaLore, OwLore, attach
from lisa_kernels.methods import Method

METHODS: dict[str, Method] = {
    "lisa": LISA(active_layers=1, period=2),
    "owlore": OwLore(active_layers=2, period=3, rank=4, scores="weight-norm", gap=2, embeddings="always"),
    "badam": BAdam(period=2),
}


def names_that_train(family: Family, model: torch.nn.Module, optimizer: Any) -> set[str]:
    """Return what the next step may change, from the family's own description."""
    blocks = tuple(f"{family.path}.{index}." for index in optimizer.active_layers)
    around = {*family.embeddings, *family.head} if optimizer.method.get("embeddings", "always") == "always" else set()
    return around | {name for name in snapshot(model) if name.startswith(blocks)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DECODERS)
def test_a_family_trains_in_its_active_layers_only(name: str, method: str) -> None:
    """Attached it computes the same; each step moves all of the active layers and nothing else; loss falls; detached
    it has the modules, keys, flags and logits of an ordinary model.
    """
    family = DECODERS[name]
    model = family.make()
    batch, plain, shape = tokens(), logits(model), anatomy(model)
    with torch.enable_grad():
        plain_loss = model(**batch).loss.item()
    optimizer = attach(model, METHODS[method], lr=5e-3)
    assert torch.equal(logits(model), plain)
    assert model(**batch).loss.item() == pytest.approx(plain_loss, rel=1e-6)
    losses = []
    for _ in range(6):
        before, wanted = snapshot(model), names_that_train(family, model, optimizer)
        losses.append(train(model, optimizer, batch))
        assert changed(model, before) == wanted
    assert losses[-1] < losses[0]
    trained = logits(model)
    optimizer.detach()
    assert anatomy(model) == shape
    assert torch.equal(logits(model), trained)
    assert not torch.equal(trained, plain)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("method", [FullFineTune(), GaLore(rank=4, gap=2)], ids=lambda method: method.name)
def test_methods_without_a_draw_train_everything(name: str, method: Method) -> None:
    """Full fine-tuning and GaLore move every parameter of the language model in every step."""
    family = DECODERS[name]
    model = family.make()
    shape = anatomy(model)
    optimizer = attach(model, method, lr=5e-3)
    assert optimizer.active_layers == [0, 1, 2]
    for _ in range(3):
        before = snapshot(model)
        train(model, optimizer, tokens())
        assert changed(model, before) == set(before)
    optimizer.detach()
    assert anatomy(model) == shape


def test_a_vision_language_model_trains_on_images() -> None:
    """With pictures in the batch the vision tower and the projector run, and stay bit-equal."""
    model = llava()
    torch.manual_seed(0)
    batch = tokens(columns=12)
    batch["input_ids"][:, 2:6] = IMAGE_TOKEN
    batch["labels"][:, 2:6] = -100
    batch["pixel_values"] = torch.randn(2, 3, 8, 8)
    optimizer = attach(model, OwLore(active_layers=1, period=2, rank=4, scores="uniform"), lr=5e-3)
    before = snapshot(model)
    losses = [train(model, optimizer, batch) for _ in range(6)]
    moved = changed(model, before)
    assert losses[-1] < losses[0]
    assert any(name.startswith("model.language_model.layers.") for name in moved)
    assert not any(name.startswith(("model.vision_tower.", "model.multi_modal_projector.")) for name in moved)
