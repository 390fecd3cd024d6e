"""Low rank equals its definition: projected gradients, the fold, accumulation, clipping, checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import DECODERS, build, common, llama, snapshot, tokens, train
from torch import Tensor, nn

from lisa_kernels import OwLore, attach
from lisa_kernels.layers import LowRankLinear
from lisa_kernels.methods import SampledAdamW, slots

RANK = 4


def attached(model: nn.Module, rank: int = RANK, gap: int = 0, **settings: Any) -> SampledAdamW:
    """Attach OwLore with every layer active, so that the whole model can be compared."""
    method = OwLore(active_layers=3, period=1000, rank=rank, gap=gap, scores="uniform", embeddings="always")
    return attach(model, method, **{"lr": 1e-2, **settings})


def layers_of(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear))


def plain_gradients(plain: nn.Module, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the summed gradient of every weight [m, n] of an ordinary model, as its linear layer reads it."""
    plain.zero_grad()
    for batch in batches:
        plain(**batch).loss.backward()
    return {name: param.grad.clone() for name, param in plain.named_parameters() if param.grad is not None}


def gradient_of(name: str, layer: LowRankLinear, gradients: dict[str, Tensor]) -> Tensor:
    found = gradients[f"{name}.weight"]
    return found.t() if layer.transposed else found


def check_projected(model: nn.Module, gradients: dict[str, Tensor]) -> None:
    """Assert dB = P Gᵀ in every layer, to float32 rounding."""
    count = 0
    for name, layer in layers_of(model):
        wanted = layer.basis @ gradient_of(name, layer, gradients).t()
        torch.testing.assert_close(layer.slot.grad, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        count += 1
    assert count >= 9


def take_and_restore(model: nn.Module, optimizer: SampledAdamW) -> None:
    """Take one step of size zero: bases are found, weights stay."""
    for group in optimizer.param_groups:
        group["lr"], group["wanted"] = 0.0, group["lr"]
    train(model, optimizer, tokens(seed=5))
    for group in optimizer.param_groups:
        group["lr"] = group.pop("wanted")


@pytest.mark.parametrize("capturing", [True, False], ids=["the step that finds the basis", "a later step"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2", "phi3"])
def test_the_slots_gradient_is_the_projected_gradient(name: str, capturing: bool) -> None:
    """dB = P Gᵀ with G from the ordinary model, and all other gradients are the ordinary ones."""
    model = DECODERS[name].make()
    plain = copy.deepcopy(model)
    optimizer = attached(model)
    if not capturing:
        take_and_restore(model, optimizer)
    batch = tokens(seed=1)
    gradients = plain_gradients(plain, batch)
    model(**batch).loss.backward()
    check_projected(model, gradients)
    full = {name: param for name, param in model.named_parameters() if param.requires_grad and "slot" not in name}
    assert full
    for key, param in full.items():
        torch.testing.assert_close(param.grad, gradients[key], rtol=1e-4, atol=1e-6)


def test_a_wrong_basis_fails_the_same_check() -> None:
    """Negative control: one row of one basis turned round is noticed."""
    model = llama()
    plain = copy.deepcopy(model)
    attached(model)
    model(**tokens()).loss.backward()
    gradients = plain_gradients(plain, tokens())
    check_projected(model, gradients)
    next(layers_of(model))[1].basis[0] *= -1
    with pytest.raises(AssertionError):
        check_projected(model, gradients)


def test_at_full_rank_nothing_is_lost() -> None:
    """With a basis of all directions the lifted gradient Bᵀ P is the full gradient itself."""
    model = build("LlamaForCausalLM", "LlamaConfig", **common(num_key_value_heads=4, intermediate_size=32))
    plain = copy.deepcopy(model)
    attached(model, rank=32)
    model(**tokens()).loss.backward()
    gradients = plain_gradients(plain, tokens())
    for name, layer in layers_of(model):
        gradient = gradients[f"{name}.weight"]
        lifted = layer.slot.grad.t() @ layer.basis
        torch.testing.assert_close(lifted, gradient, rtol=0, atol=2e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_weight_moves_by_the_lifted_adam_step(name: str) -> None:
    """W ← (1 − lr·wd) W + Bᵀ P, step by step, where B is what torch's own AdamW makes of dB."""
    lr, decay = 1e-2, 0.1
    model = DECODERS[name].make()
    optimizer = attached(model, lr=lr, weight_decay=decay)
    layers = dict(layers_of(model))
    twins = {key: nn.Parameter(torch.zeros(RANK, layer.out_features)) for key, layer in layers.items()}
    reference = torch.optim.AdamW(twins.values(), lr=lr, weight_decay=0.0)
    for step in range(4):
        model(**tokens(seed=step)).loss.backward()
        for key, layer in layers.items():
            twins[key].data.zero_()
            twins[key].grad = layer.slot.grad.clone()
        reference.step()
        old = {key: layer.matrix.detach().clone() for key, layer in layers.items()}
        optimizer.step()
        optimizer.zero_grad()
        for key, layer in layers.items():
            wanted = (1 - lr * decay) * old[key] + twins[key].detach().t() @ layer.basis
            torch.testing.assert_close(layer.matrix.detach(), wanted, rtol=1e-5, atol=1e-6)
            assert not layer.slot.any()


def test_scale_weakens_the_step_but_not_the_decay() -> None:
    """GaLore's scale multiplies the lifted update; the weight's decay stays lr · weight_decay."""
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    moves = {}
    for scale in (1.0, 0.25):
        model = llama()
        method = OwLore(active_layers=3, period=1000, rank=RANK, scores="uniform", scale=scale)
        optimizer = attach(model, method, **settings)
        before = snapshot(model)
        train(model, optimizer, tokens())
        decayed = {key: value * (1 - 1e-3) for key, value in before.items()}
        moves[scale] = {key: snapshot(model)[f"{key}.weight"] - decayed[f"{key}.weight"] for key, _ in layers_of(model)}
    for key, move in moves[1.0].items():
        torch.testing.assert_close(moves[0.25][key], move / 4, rtol=1e-3, atol=1e-7)


def test_a_skipped_step_leaves_weights_and_keeps_no_bad_basis() -> None:
    """A gradient with a NaN in the step that finds the basis moves nothing; the next step finds the basis."""
    model = llama()
    optimizer = attached(model)
    before = snapshot(model)
    loss = model(**tokens()).loss
    (loss * float("nan")).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    train(model, optimizer, tokens())
    for _, layer in layers_of(model):
        torch.testing.assert_close(layer.basis @ layer.basis.t(), torch.eye(RANK), rtol=0, atol=1e-5)
    assert all(torch.isfinite(value).all() for value in snapshot(model).values())


@pytest.mark.parametrize("capturing", [True, False], ids=["the step that finds the basis", "a later step"])
def test_micro_batches_add_up(capturing: bool) -> None:
    """Four backwards give P (ΣG)ᵀ, all four in the same basis, even where the first of them finds it."""
    model = llama()
    plain = copy.deepcopy(model)
    optimizer = attached(model)
    if not capturing:
        take_and_restore(model, optimizer)
    batches = [tokens(seed=seed) for seed in range(4)]
    for batch in batches:
        model(**batch).loss.backward()
    check_projected(model, plain_gradients(plain, *batches))


def test_accumulation_moves_the_weights_as_one_large_batch_does() -> None:
    """Four micro-batches, each a quarter of the loss, and one batch of four give the same weights to rounding."""
    rows = tokens(rows=8)
    models = []
    for parts in (1, 4):
        model = llama()
        # A large eps keeps Adam from magnifying the rounding of gradients that are almost zero.
        optimizer = attached(model, eps=1e-3)
        train(model, optimizer, tokens(seed=7))
        for part in range(parts):
            size = 8 // parts
            batch = {name: value[part * size : (part + 1) * size] for name, value in rows.items()}
            (model(**batch).loss / parts).backward()
        optimizer.step()
        optimizer.detach()
        models.append(model)
    for (name, left), right in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5, msg=name)


def test_clipping_sees_slots() -> None:
    """`clip_grad_norm_` over the model counts slot gradients and scales them."""
    model = llama()
    attached(model)
    model(**tokens()).loss.backward()
    grads = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    slots = [name for name in grads if name.endswith(".slot")]
    assert len(slots) == 21
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    wanted = torch.stack([grad.norm() for grad in grads.values()]).norm()
    torch.testing.assert_close(norm, wanted)
    assert torch.stack([grads[name].norm() for name in slots]).norm() > 0.1 * wanted
    for name in slots:
        torch.testing.assert_close(model.get_parameter(name).grad, grads[name] * (0.01 / norm), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("capturing", [True, False], ids=["the step that finds the basis", "a later step"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(name: str, capturing: bool) -> None:
    """With and without recomputation, bases and gradients are equal, to the rounding of sums in another order."""
    found = []
    for checkpointing in (False, True):
        model = DECODERS[name].make()
        optimizer = attached(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not capturing:
            take_and_restore(model, optimizer)
        model(**tokens()).loss.backward()
        grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
        found.append({**grads, **{name: layer.basis for name, layer in layers_of(model)}})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_two_forwards_before_their_backwards(checkpointing: bool) -> None:
    """A loss over two forwards works in the step that finds the basis; recomputation repeats what the forward did."""
    model = llama()
    plain = copy.deepcopy(model)
    attached(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    first, second = tokens(seed=1), tokens(seed=2)
    losses = [model(**first).loss, model(**second).loss]
    losses[0].backward(retain_graph=True)
    losses[1].backward()
    losses[0].backward()
    check_projected(model, plain_gradients(plain, first, second, first))


def test_a_refresh_carries_the_moments_into_the_new_basis() -> None:
    """At a refresh the first moment becomes β₁ · Q m + (1 − β₁) · dB with Q = P_new P_oldᵀ."""
    model = llama()
    optimizer = attached(model, gap=3)
    layer = model.model.layers[1].mlp.down_proj
    refreshes = 0
    for seed in range(7):
        old = None if seed == 0 else (optimizer.moments(layer.slot)[0], layer.basis.clone())
        model(**tokens(seed=seed)).loss.backward()
        gradient = layer.slot.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        if old is None:
            continue
        rotation = layer.basis @ old[1].t()
        turned = not torch.allclose(rotation, torch.eye(RANK), atol=1e-2)
        refreshes += turned
        wanted = 0.9 * rotation @ old[0] + 0.1 * gradient
        torch.testing.assert_close(optimizer.moments(layer.slot)[0], wanted, rtol=1e-4, atol=1e-6)
        assert turned or torch.equal(layer.basis, old[1])
    assert refreshes == 2


def test_moments_that_are_carried_together_are_those_carried_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; and a pair of betas may be a list, as JSON has it."""
    weights = []
    for elements, pair in ((slots.TURNED_ELEMENTS, tuple), (1, list)):
        monkeypatch.setattr(slots, "TURNED_ELEMENTS", elements)
        model = llama()
        optimizer = attached(model, gap=2)
        for group in optimizer.param_groups:
            group["betas"] = pair(group["betas"])
        for seed in range(4):
            train(model, optimizer, tokens(seed=seed))
        weights.append(snapshot(model))
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_a_refresh_that_a_bad_gradient_prevents_keeps_every_bit() -> None:
    """Bases and moments are what they were, though a refresh of all of them was due."""
    model = llama()
    optimizer = attached(model, gap=1)
    train(model, optimizer, tokens(seed=1))
    layers = [layer for _, layer in layers_of(model)]
    before = [[tensor.clone() for tensor in (layer.basis, *optimizer.state[layer.slot].values())] for layer in layers]
    assert all(layer.capturing for layer in layers)
    (model(**tokens()).loss * float("inf")).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(layer.tracker is not None and layer.tracker.postponed == 1 for layer in layers)
    for layer, tensors in zip(layers, before):
        for now, then in zip((layer.basis, *optimizer.state[layer.slot].values()), tensors):
            assert torch.equal(now, then)


def test_a_step_skipped_for_another_gradient_takes_refreshed_bases_back() -> None:
    """Every basis was refreshed by a good gradient; bases and moments are still what they were before."""
    model = llama()
    optimizer = attached(model, gap=1)
    train(model, optimizer, tokens(seed=1))
    layers = [layer for _, layer in layers_of(model)]
    before = [[tensor.clone() for tensor in (layer.basis, *optimizer.state[layer.slot].values())] for layer in layers]
    model(**tokens()).loss.backward()
    assert not any(torch.equal(layer.basis, tensors[0]) for layer, tensors in zip(layers, before))
    layers[0].slot.grad[0, 0] = float("inf")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for layer, tensors in zip(layers, before):
        for now, then in zip((layer.basis, *optimizer.state[layer.slot].values()), tensors):
            assert torch.equal(now, then)
    optimizer.zero_grad()
    train(model, optimizer, tokens(seed=2))
    assert not any(torch.equal(layer.basis, tensors[0]) for layer, tensors in zip(layers, before))


def test_refreshes_are_staggered() -> None:
    """No step refreshes the bases of all layers, and within one gap each is refreshed once."""
    model = llama()
    optimizer = attached(model, gap=6)
    layers = dict(layers_of(model))
    train(model, optimizer, tokens())
    counts = dict.fromkeys(layers, 0)
    for _ in range(6):
        due = [name for name, layer in layers.items() if layer.capturing]
        assert len(due) < len(layers) / 2
        for name in due:
            counts[name] += 1
        train(model, optimizer, tokens())
    assert set(counts.values()) == {1}
