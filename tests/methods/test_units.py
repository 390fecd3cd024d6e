"""Parameters are sorted into units that train as a whole; LoRA-FA needs no blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import (
    DECODERS,
    anatomy,
    build,
    changed,
    common,
    llama,
    logits,
    roberta_classifier,
    roberta_masked,
    snapshot,
    t5,
    tokens,
    train,
)

from lisa_kernels import LoRAFA, OwLore, attach
from lisa_kernels.layers import LowRankLinear
from lisa_kernels.methods.units import make_plan


def classification() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens()["input_ids"], "labels": torch.tensor([0, 1])}


def llama_classifier() -> Any:
    return build("LlamaForSequenceClassification", "LlamaConfig", **common(num_labels=2))


ADAPTED: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, torch.Tensor]], tuple[str, ...]]] = {
    "roberta-classifier": (roberta_classifier, classification, ("classifier.",)),
    "roberta-masked": (roberta_masked, tokens, ()),
    "llama-classifier": (llama_classifier, classification, ("score.",)),
    "t5": (t5, tokens, ()),
    "llama": (llama, tokens, ()),
    "gpt2": (DECODERS["gpt2"].make, tokens, ()),
    "mixtral": (DECODERS["mixtral"].make, tokens, ()),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_lora_fa_trains_slots_and_new_heads_only(name: str) -> None:
    """Decoders, encoders and encoder-decoders: loss falls, no pretrained weight moves until `detach()` merges."""
    make, batch, new = ADAPTED[name]
    model = make()
    shape, before, plain = anatomy(model), snapshot(model), logits(model, batch())
    optimizer = attach(model, LoRAFA(rank=4, alpha=8), lr=1e-2)
    torch.testing.assert_close(logits(model, batch()), plain, rtol=1e-5, atol=1e-6)
    losses = [train(model, optimizer, batch()) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert changed(model, before) == {key for key in before if new and key.startswith(new)}
    trained = logits(model, batch())
    optimizer.detach()
    assert anatomy(model) == shape
    torch.testing.assert_close(logits(model, batch()), trained, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained, plain, atol=1e-3)


def test_lora_fa_is_its_definition() -> None:
    """y = x Wᵀ + (alpha / rank) (x Aᵀ) B with orthonormal rows of A, which no step changes; detach adds just that."""
    model = llama()
    layer_before = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    optimizer = attach(model, LoRAFA(rank=4, alpha=12, targets=("q_proj",)), lr=1e-2)
    layer = model.model.layers[1].self_attn.q_proj
    basis = layer.basis.clone()
    torch.testing.assert_close(basis @ basis.t(), torch.eye(4), rtol=0, atol=1e-6)
    for seed in range(3):
        train(model, optimizer, tokens(seed=seed))
    assert torch.equal(layer.basis, basis)
    assert layer.slot.any()
    merged = layer_before + 3.0 * layer.slot.detach().t() @ basis
    optimizer.detach()
    torch.testing.assert_close(model.model.layers[1].self_attn.q_proj.weight.detach(), merged, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("targets", "count"), [("all-linear", 21), (("q_proj", "v_proj"), 6), ("mlp.up_proj", 3), ("lm_head", 1)], ids=str
)
def test_targets_name_the_ends_of_paths(targets: Any, count: int) -> None:
    """ "all-linear" leaves the output layer out, a name takes every layer whose path ends with it."""
    model = llama()
    attach(model, LoRAFA(rank=4, targets=targets))
    assert sum(isinstance(module, LowRankLinear) for module in model.modules()) == count


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("embeddings", ["always", "frozen", "sampled"])
def test_every_language_parameter_is_in_one_unit(name: str, embeddings: str) -> None:
    """Weights under slots, full parameters and what stands around: each once; nothing of other towers."""
    family = DECODERS[name]
    model = family.make()
    wanted = {
        id(param): key
        for key, param in model.named_parameters()
        if not key.startswith(family.foreign or ("-",))
        and (embeddings != "frozen" or key not in {*family.embeddings, *family.head})
    }
    plan = make_plan(model, OwLore(active_layers=1, rank=4, embeddings=embeddings), 0, None)
    found = [id(param) for unit in plan.units() for param in unit.full]
    found += [id(layer.weight) for unit in plan.units() for layer in unit.lowrank.values()]
    assert len(found) == len(set(found))
    assert {wanted.get(key, "foreign") for key in found} == set(wanted.values())
    extra = (
        0
        if embeddings != "sampled"
        else 1
        if name in ("llama-tied", "qwen2", "gemma2", "gemma3", "gpt2", "falcon")
        else 2
    )
    assert len(plan.drawn) == 3 + extra
