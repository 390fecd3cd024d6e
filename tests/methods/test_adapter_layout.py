"""LoRA-FA puts adapters where its targets say, and trains them and new heads only."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import ADAPTED, anatomy, changed, llama, logits, mixtral, roberta_classifier, snapshot, tokens, train

from lisa_kernels import InputError, LoRAFA, attach
from lisa_kernels.layers import LowRankLinear


@pytest.mark.parametrize("name", ADAPTED)
def test_lora_fa_trains_slots_and_new_heads_only(name: str) -> None:
    """Decoders, encoders and encoder-decoders: loss falls, no pretrained weight moves until `detach()` merges."""
    adapted = ADAPTED[name]
    model, batch, new = adapted.make(), adapted.batch, adapted.head
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


def test_a_new_head_trains_in_full_whatever_the_targets_say() -> None:
    """ "dense" ends the path of a layer in RoBERTa's classifier too: that one gets no adapter beside its training."""
    model = roberta_classifier()
    attach(model, LoRAFA(rank=4, targets="dense"))
    assert not isinstance(model.classifier.dense, LowRankLinear)
    assert model.classifier.dense.weight.requires_grad
    assert isinstance(model.roberta.encoder.layer[0].output.dense, LowRankLinear)


@pytest.mark.parametrize("targets", ["lm_head", ("q_proj", "lm_head")], ids=str)
def test_a_tied_weight_is_refused_with_the_reason(targets: Any) -> None:
    """Merged into the output layer, an adapter would change the embedding."""
    model = llama(tied=True)
    before = anatomy(model)
    with pytest.raises(InputError, match=r"lm_head is tied to that of model\.embed_tokens"):
        attach(model, LoRAFA(rank=4, targets=targets))
    assert anatomy(model) == before
    attach(llama(), LoRAFA(rank=4, targets=targets))


def test_nothing_unfreezes_the_down_projection() -> None:
    """A is a buffer: whatever is switched on, a step moves B and neither A nor W."""
    model = llama()
    optimizer = attach(model, LoRAFA(rank=4), lr=1e-2)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    bases, before = {name: layer.basis.clone() for name, layer in layers.items()}, snapshot(model)
    model.requires_grad_(True)
    for module in model.modules():
        module.requires_grad_(True)
        module.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.warns(UserWarning, match="changed outside"):
        train(model, optimizer, tokens())
    for layer in layers.values():
        layer.weight.requires_grad = True
    train(model, optimizer, tokens(seed=1))
    assert not changed(model, before)
    for name, layer in layers.items():
        assert torch.equal(layer.basis, bases[name])
        assert not layer.basis.requires_grad
        assert layer.slot.any()
    names = {name for name, _ in model.named_parameters()}
    assert not any(name.endswith(".basis") for name in names)
    assert not any(name.endswith((".basis", ".slot")) for name in model.state_dict())


@pytest.mark.parametrize(("make", "first"), [(mixtral, "model.layers.0.mlp.gate.weight"), (llama, None)])
def test_what_no_adapter_reaches_is_told(make: Callable[[], Any], first: str | None) -> None:
    """Experts that are one tensor stay as they are, and one sentence names them and who trains them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        attach(make(), LoRAFA(rank=4))
    told = [str(warning.message) for warning in said if "no adapter reaches" in str(warning.message)]
    assert len(told) == (first is not None)
    assert all(str(first) in text and "OwLore" in text for text in told)
