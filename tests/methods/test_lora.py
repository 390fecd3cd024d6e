"""LoRA: both factors train as peft's do, and its folders are peft's to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import anatomy, gpt2, llama, logits, snapshot, tokens, train
from tolerances import PRODUCT

from lisa_kernels import InputError, LoRA, attach
from lisa_kernels.layers import TrainedBasisLinear
from lisa_kernels.methods import SampledAdamW
from lisa_kernels.methods.groups import FOLDED_SHARE

MODELS = {"llama": llama, "gpt2": gpt2}


def attached(model: Any, steps: int = 0) -> SampledAdamW:
    """Attach LoRA of rank 4 and take some steps."""
    optimizer = attach(model, LoRA(rank=4, alpha=8), lr=1e-2)
    for seed in range(steps):
        train(model, optimizer, tokens(seed=seed))
    return optimizer


def layers_of(model: Any) -> dict[str, TrainedBasisLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, TrainedBasisLinear)}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_loss_and_gradients_are_those_of_peft(make: Callable[[], Any], tmp_path: Path) -> None:
    """On the same factors, at the start, where A's gradient is zero, and after steps."""
    import peft

    for steps in (0, 3):
        model = make()
        attached(model, steps).save_adapter(tmp_path / "adapter")
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter", is_trainable=True)
        losses = []
        for each in (model, theirs):
            batch = tokens(seed=7)
            losses.append(each(**batch).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses)
        for path, layer in layers_of(model).items():
            peer = theirs.get_submodule(f"base_model.model.{path}")
            for ours, its in ((layer.basis.grad, peer.lora_A), (layer.slot.grad, peer.lora_B)):
                given = its["default"].weight.grad
                wanted = given if its is peer.lora_A else given.t()
                assert ours is not None
                torch.testing.assert_close(ours, wanted, rtol=0, atol=20 * PRODUCT * float(wanted.norm()))
                assert bool(wanted.any()) == (steps > 0 or its is peer.lora_B)


def test_b_moves_faster_than_a_around_the_rate_that_is_given() -> None:
    """By the ratio asked for; decay is that of the rate itself, and embeddings beside adapters have a share of it."""
    model = llama()
    optimizer = attach(model, LoRA(rank=4, rate_ratio=9.0, embeddings="low-rank"), lr=1e-2, weight_decay=0.1)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"slots": 3e-2, "bases": 1e-2 / 3, "folded": 1e-2 * FOLDED_SHARE})
    decays = [group["lr"] * group["weight_decay"] for group in optimizer.param_groups]
    assert decays == pytest.approx([1e-3] * 3)
    # Adam's first step of a B that was zero is as large as its rate; A's gradient is zero then, and the second as its.
    layer = next(iter(layers_of(model).values()))
    train(model, optimizer, tokens(seed=0))
    assert float(layer.slot.detach().abs().median()) == pytest.approx(3e-2, rel=0.05)
    basis = layer.basis.detach().clone()
    train(model, optimizer, tokens(seed=1))
    assert 0 < float((layer.basis.detach() - basis).abs().max()) < 1.6e-2
    with pytest.raises(InputError, match="rate_ratio is 0"):
        LoRA(rate_ratio=0)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_both_factors_train_and_nothing_else(make: Callable[[], Any]) -> None:
    """The weights that `state_dict()` holds are those that the model computes with; detached it is an ordinary one."""
    model, plain = make(), make()
    shape = anatomy(model)
    optimizer = attached(model)
    before = {
        path: (layer.basis.detach().clone(), layer.stored_weight.clone()) for path, layer in layers_of(model).items()
    }
    for seed in range(3):
        train(model, optimizer, tokens(seed=seed))
    for path, layer in layers_of(model).items():
        basis, weight = before[path]
        assert torch.equal(layer.stored_weight, weight)
        assert not torch.equal(layer.basis, basis)
        assert layer.slot.any()
    assert set(model.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    optimizer.detach()
    assert anatomy(model) == shape
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in snapshot(model).items())


def test_a_weight_that_others_multiply_by_trains_both_factors() -> None:
    """A fused kernel that reads `layer.weight` in the model's forward gives both the gradients that the layer gives."""
    gradients = []
    for reads in (False, True):
        model = llama()
        attached(model, steps=1)
        layer = model.model.layers[0].mlp.down_proj
        if reads:
            layer.forward = lambda x, layer=layer: torch.nn.functional.linear(x, layer.weight)
        batch = tokens(seed=3)
        model.train()(**batch).loss.backward()
        gradients.append((layer.slot.grad, layer.basis.grad))
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
        assert one.any()


def test_an_adapter_of_peft_is_taken_as_it_is(tmp_path: Path) -> None:
    """A is not split, whatever its rows are; what is saved again has the same bits."""
    import peft
    from safetensors.torch import load_file

    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, param in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path / "theirs")
    model = llama()
    optimizer = attached(model)
    optimizer.load_adapter(tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
    optimizer.save_adapter(tmp_path / "ours")
    ours, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert set(ours) == set(wanted)
    assert all(torch.equal(ours[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embedding_and_head_train_beside_the_adapters(tied: bool, tmp_path: Path) -> None:
    """In their own weights, which a saved model holds; an adapter's folder would not, and is refused."""
    model = llama(tied=tied)
    optimizer = attach(model, LoRA(rank=4, embeddings="low-rank"), lr=1e-2)
    before = snapshot(model)
    for seed in range(2):
        train(model, optimizer, tokens(seed=seed))
    wanted = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert {name for name in before if not torch.equal(before[name], snapshot(model)[name])} == wanted
    with pytest.raises(InputError, match="save the whole model"):
        optimizer.save_adapter(tmp_path / "adapter")
    trained = logits(model)
    plain = llama(tied=tied)
    plain.load_state_dict(model.state_dict())
    optimizer.merge()
    optimizer.unmerge()
    assert torch.equal(logits(model), trained)
    optimizer.detach()
    for each in (model, plain):
        torch.testing.assert_close(logits(each), trained, rtol=1e-4, atol=1e-5)


def test_what_cannot_train_twice_is_refused() -> None:
    """And embeddings that would train in full."""
    with pytest.raises(InputError, match="name the output layer"):
        attach(llama(), LoRA(rank=4, targets=("lm_head", "q_proj"), embeddings="low-rank"))
    with pytest.raises(InputError, match='"frozen" or "low-rank" is wanted'):
        LoRA(embeddings="always")
