"""Adapters merge into the weights and come out again, exactly, between steps of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ADAPTED, anatomy, gpt2, llama, logits, snapshot, tokens, train
from tolerances import BFLOAT16_PRODUCT, BFLOAT16_ROUNDING

from lisa_kernels import LISA, InputError, LoRA, LoRAFA, attach
from lisa_kernels.layers import LowRankLinear
from lisa_kernels.methods import Method, SampledAdamW

MODELS = {"llama": llama, "gpt2": gpt2}


METHODS: dict[str, Method] = {"lora": LoRA(rank=4, alpha=8), "lora-fa": LoRAFA(rank=4, alpha=8)}


def trained(
    make: Callable[[], Any] = llama, dtype: torch.dtype = torch.float32, method: Method = METHODS["lora-fa"]
) -> tuple[Any, SampledAdamW]:
    """Return a model with adapters that do something, and its optimizer."""
    model = make().to(dtype)
    optimizer = attach(model, method, lr=1e-2)
    for seed in range(4):
        train(model, optimizer, tokens(seed=seed))
    return model, optimizer


def slots(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    beside = (".slot", ".basis")
    return {name: param.detach().clone() for name, param in model.named_parameters() if name.endswith(beside)}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_merged_weights_hold_the_adapters(make: Callable[[], Any], method: Method) -> None:
    """W + (alpha / rank) Bᵀ A, read by plain linears: the logits stay what they were."""
    model, optimizer = trained(make, method=method)
    before = logits(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    wanted = {
        name: layer.matrix.detach() + 2.0 * layer.slot.detach().t() @ layer.basis.detach()
        for name, layer in layers.items()
    }
    optimizer.merge()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.matrix.detach(), wanted[name], rtol=1e-5, atol=1e-7)
        assert not layer.active
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_merging_in_16_bits_errs_by_one_rounding() -> None:
    """Each merged weight is the nearest to W + (alpha / rank) Bᵀ A, and the model stays near the adapted one."""
    model, optimizer = trained(dtype=torch.bfloat16)
    adapted = logits(model).float()
    layer = model.model.layers[1].mlp.down_proj
    wanted = layer.weight.detach().float() + 2.0 * layer.slot.detach().t() @ layer.basis.float()
    optimizer.merge()
    found = layer.weight.detach().float()
    assert ((found - wanted).abs() <= 2.001 * BFLOAT16_ROUNDING * wanted.abs()).all()
    merged = logits(model).float()
    plain = logits(llama().to(torch.bfloat16)).float()
    assert (merged - adapted).norm() < 0.1 * (plain - adapted).norm()
    assert (merged - adapted).norm() < 4 * BFLOAT16_PRODUCT * adapted.norm()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("make", "dtype"), [(llama, torch.float32), (gpt2, torch.bfloat16)], ids=MODELS)
def test_unmerging_is_exact_and_training_goes_on(make: Callable[[], Any], dtype: torch.dtype, method: Method) -> None:
    """Weights, slots and every later step are bit-equal to those of a model that was never merged."""
    runs = []
    for merging in (False, True):
        model, optimizer = trained(make, dtype, method)
        weights, adapters = snapshot(model), slots(model)
        if merging:
            model.eval()
            optimizer.merge()
            assert any(not torch.equal(value, weights[name]) for name, value in snapshot(model).items())
            logits(model)
            optimizer.unmerge()
            model.train()
        assert all(torch.equal(value, weights[name]) for name, value in snapshot(model).items())
        assert all(torch.equal(value, adapters[name]) for name, value in slots(model).items())
        losses = [train(model, optimizer, tokens(seed=seed)) for seed in range(3)]
        runs.append((losses, slots(model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def test_merging_twice_is_merging_once() -> None:
    """A second merge, and an unmerge of what is not merged, change nothing."""
    model, optimizer = trained()
    before = snapshot(model)
    optimizer.unmerge()
    optimizer.merge()
    merged = snapshot(model)
    optimizer.merge()
    assert all(torch.equal(value, merged[name]) for name, value in snapshot(model).items())
    optimizer.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "roberta-classifier"])
def test_detaching_a_merged_model_merges_once(name: str, dtype: torch.dtype) -> None:
    """`detach()` gives the same weights before and after `merge()`, and an ordinary model."""
    detached = []
    for merging in (False, True):
        model = ADAPTED[name].make().to(dtype)
        shape = anatomy(model)
        optimizer = attach(model, LoRAFA(rank=4), lr=1e-2)
        train(model, optimizer, ADAPTED[name].batch())
        if merging:
            optimizer.merge()
        optimizer.detach()
        assert anatomy(model) == shape
        detached.append(snapshot(model))
    assert all(torch.equal(value, detached[1][key]) for key, value in detached[0].items())


def test_while_merged_what_needs_the_slots_is_refused(tmp_path: Path) -> None:
    """A step, a state or another adapter would see weights that hold the adapters already; unmerged all work."""
    model, optimizer = trained()
    state = optimizer.state_dict()
    optimizer.save_adapter(tmp_path / "adapter")
    optimizer.merge()
    weights = snapshot(model)
    calls: list[Callable[[], Any]] = [
        optimizer.step,
        optimizer.state_dict,
        lambda: optimizer.load_state_dict(state),
        lambda: optimizer.load_adapter(tmp_path / "adapter"),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"unmerge\(\)"):
            call()
    assert all(torch.equal(value, weights[name]) for name, value in snapshot(model).items())
    optimizer.unmerge()
    for call in calls:
        call()


def test_other_methods_have_no_adapters(tmp_path: Path) -> None:
    """And a detached model has none any more."""
    sampled = attach(llama(), LISA(active_layers=1))
    _, detached = trained()
    detached.detach()
    for optimizer, reason in ((sampled, "no adapters"), (detached, "detached")):
        for call in (
            optimizer.merge,
            optimizer.unmerge,
            lambda optimizer=optimizer: optimizer.save_adapter(tmp_path / "adapter"),
            lambda optimizer=optimizer: optimizer.load_adapter(tmp_path / "adapter"),
        ):
            with pytest.raises(InputError, match=reason):
                call()
    assert not any(tmp_path.iterdir())
