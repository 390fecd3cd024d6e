"""Weights that rest in few bits: their masters learn, are what is saved, and come back as they were."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from families import gpt2, llama, logits, tokens, train
from torch import Tensor

from lisa_kernels import LISA, GaLore, InputError, LoRA, OwLore, attach, plan
from lisa_kernels.layers import RestingLinear
from lisa_kernels.methods import Method, SampledAdamW
from lisa_kernels.ops import resting_linear
from lisa_kernels.ops.resting import KINDS, dequantize_resting_, quantize_resting
from lisa_kernels.plan import Plan
from lisa_kernels.plan.empty_model import empty_model
from lisa_kernels.plan.rehearsal import Workload, rehearse

OF_KIND = pytest.mark.parametrize("kind", KINDS)
METHODS: dict[str, Method] = {
    "owlore": OwLore(active_layers=1, period=3, rank=4, scores="uniform", embeddings="frozen"),
    # Refreshes are due in mid-period.
    "owlore-gap": OwLore(active_layers=2, period=7, gap=3, rank=4, scores="uniform"),
    "owlore-keep": OwLore(active_layers=1, period=2, gap=3, rank=4, scores="uniform", retired_state="keep"),
    "owlore-page": OwLore(active_layers=1, period=2, gap=3, rank=4, scores="uniform", retired_state="page"),
    "galore": GaLore(rank=4, gap=3, embeddings="low-rank"),
}


def start(method: Method, kind: str | None, dtype: torch.dtype = torch.float32) -> tuple[Any, SampledAdamW]:
    model = llama(layers=3, hidden_size=64, intermediate_size=96).to(dtype)
    return model, attach(model, method, lr=3e-3, seed=5, resting=kind)


def run(model: Any, optimizer: SampledAdamW, first: int, last: int) -> None:
    for step in range(first, last):
        train(model, optimizer, tokens(1, 6, seed=step))


def resting(model: Any) -> dict[str, RestingLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, RestingLinear)}


def through_disk(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def woken(layer: RestingLinear) -> Tensor:
    return dequantize_resting_(torch.empty(layer.matrix.shape), layer.codes, layer.absmax, layer.kind)


@OF_KIND
def test_a_layer_computes_with_what_its_codes_mean(kind: str) -> None:
    model, plain = start(METHODS["galore"], kind)[0], llama(layers=3, hidden_size=64, intermediate_size=96)
    for path, layer in resting(model).items():
        plain.get_submodule(path).weight.data.copy_(woken(layer))
    assert len(resting(model)) == 3 * 7
    assert torch.equal(logits(model, tokens()), logits(plain, tokens()))


@OF_KIND
@pytest.mark.parametrize("name", METHODS)
def test_masters_learn_what_slots_did(name: str, kind: str) -> None:
    """In float32: what is saved in mid-training is what is there after it, and it is near what 16 bits learn."""
    before = llama(layers=3, hidden_size=64, intermediate_size=96).state_dict()
    ends: list[dict[str, Tensor]] = []
    for how in (kind, None):
        model, optimizer = start(METHODS[name], how)
        run(model, optimizer, 0, 10)
        saved = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer.detach()
        assert not resting(model)
        ends.append(model.state_dict())
        for key, value in ends[-1].items():
            assert torch.equal(saved[key], value), key
    moved = [torch.cat([(end[key] - before[key]).flatten() for key in before]) for end in ends]
    assert float(moved[0].norm()) > 0
    alike = torch.nn.functional.cosine_similarity(moved[0], moved[1], dim=0)
    assert float(alike) > (0.9 if kind == "int8" else 0.6)


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_lose_nothing_at_rest_learn_what_folded_ones_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With codes that mean the weight itself, a slot that waits to be settled ends where one does that is folded."""
    meant: dict[int, Tensor] = {}

    def rest(layer: RestingLinear, master: Tensor) -> None:
        quantise(layer, master)
        meant[layer.codes.data_ptr()] = layer.matrix.detach().clone()

    quantise = RestingLinear._rest
    monkeypatch.setattr(RestingLinear, "_rest", rest)
    monkeypatch.setattr(resting_linear, "_woken", lambda like, codes, *_: meant[codes.data_ptr()])
    before, ends = llama(layers=3, hidden_size=64, intermediate_size=96).state_dict(), []
    for kind in ("nf4", None):
        model = llama(layers=3, hidden_size=64, intermediate_size=96)
        optimizer = attach(model, METHODS[name], lr=3e-3, seed=5, rounding="nearest", resting=kind)
        run(model, optimizer, 0, 10)
        ends.append(torch.cat([(end - before[key]).flatten() for key, end in optimizer.detach().state_dict().items()]))
    assert float((ends[0] - ends[1]).norm()) < 2e-3 * float(ends[1].norm())


@OF_KIND
def test_only_the_layers_that_left_rest_anew(kind: str) -> None:
    """Between switches neither masters nor codes move; after one, codes are those of the masters."""
    model, optimizer = start(METHODS["owlore"], kind)
    layers, drawn = resting(model), []
    for period in range(3):
        [active] = optimizer.active_layers
        drawn.append(active)
        masters = {path: layer.stored_weight.clone() for path, layer in layers.items()}
        codes = {path: layer.codes.clone() for path, layer in layers.items()}
        run(model, optimizer, 3 * period, 3 * period + 2)
        assert all(torch.equal(layers[path].stored_weight, master) for path, master in masters.items())
        run(model, optimizer, 3 * period + 2, 3 * period + 3)
        for path, layer in layers.items():
            left = path.startswith(f"model.layers.{active}.") and optimizer.active_layers != [active]
            assert torch.equal(layer.stored_weight, masters[path]) != left
            assert torch.equal(layer.codes, codes[path]) != left
            assert torch.equal(quantize_resting(layer.stored_weight.detach(), kind)[0], layer.codes)
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_bit_equal(name: str) -> None:
    """Stopped in mid-period, with slots that are in no master yet."""
    model, optimizer = start(METHODS[name], "nf4", torch.bfloat16)
    run(model, optimizer, 0, 9)
    stopped, before = start(METHODS[name], "nf4", torch.bfloat16)
    run(stopped, before, 0, 5)
    weights, state = through_disk(stopped.state_dict()), through_disk(before.state_dict())
    resumed, after = start(METHODS[name], "nf4", torch.bfloat16)
    resumed.load_state_dict(weights)
    after.load_state_dict(state)
    run(resumed, after, 5, 9)
    for (path, one), other in zip(resting(model).items(), resting(resumed).values()):
        for part in ("stored_weight", "codes", "absmax", "kept", "slot", "basis"):
            assert torch.equal(getattr(one, part), getattr(other, part)), (path, part)
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_state_is_loaded_into_weights_that_rest_alike() -> None:
    """Else what is in the slots would be lost."""
    for kind, other in (("nf4", "int8"), ("nf4", None), (None, "nf4")):
        state = start(METHODS["galore"], kind)[1].state_dict()
        with pytest.raises(InputError, match=f"resting='{kind or '16-bit'}'; this run has '{other or '16-bit'}'"):
            start(METHODS["galore"], other)[1].load_state_dict(state)


def test_decay_reaches_a_master_as_it_does_a_weight() -> None:
    """Over a period as a product; the slot decays by itself."""
    ends = []
    for kind in ("int8", None):
        model = llama(layers=1)
        method = OwLore(1, 5, rank=4, scores="uniform", embeddings="frozen")
        optimizer = attach(model, method, lr=1e-3, weight_decay=20.0, resting=kind)
        train(model, optimizer, tokens())
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] / 2
        train(model, optimizer, tokens(seed=1))
        ends.append(optimizer.detach().model.layers[0].mlp.up_proj.weight.norm())
    whole = llama(layers=1).model.layers[0].mlp.up_proj.weight.norm()
    assert float(ends[0] / whole) == pytest.approx(0.98 * 0.99, abs=4e-3)
    assert float(ends[0]) == pytest.approx(float(ends[1]), rel=2e-3)


def test_weights_loaded_into_an_attached_model_rest() -> None:
    model, optimizer = start(METHODS["galore"], "int8")
    run(model, optimizer, 0, 2)
    other = {
        key: value * 1.5 for key, value in llama(layers=3, hidden_size=64, intermediate_size=96).state_dict().items()
    }
    model.load_state_dict(other)
    for path, layer in resting(model).items():
        assert torch.equal(layer.stored_weight, other[f"{path}.weight"])
        assert torch.equal(layer.codes, quantize_resting(other[f"{path}.weight"], "int8")[0])
        assert not layer.slot.any()


def test_code_that_goes_past_a_layer_multiplies_by_what_it_computes_with() -> None:
    """Within a forward; outside of one the weight is the master."""
    model, optimizer = start(METHODS["galore"], "nf4")
    run(model, optimizer, 0, 2)
    layer = next(iter(resting(model).values()))
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.weight))
    model(**tokens())
    assert torch.allclose(seen[0], woken(layer) + layer.slot.t() @ layer.basis, atol=1e-6)
    assert seen[0].requires_grad
    assert layer.weight is layer.stored_weight


def test_weights_stored_transposed_rest_too() -> None:
    model = gpt2()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = attach(model, GaLore(rank=4, gap=3, embeddings="frozen"), lr=3e-3, resting="int8")
    run(model, optimizer, 0, 5)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    end = optimizer.detach().state_dict()
    assert all(torch.equal(saved[key], end[key]) for key in end)
    moved = (end["transformer.h.0.attn.c_attn.weight"] - before["transformer.h.0.attn.c_attn.weight"]).abs().max()
    assert 0 < float(moved) < 0.1


def test_a_plan_counts_codes_in_the_place_of_weights() -> None:
    """Of each matrix in a block 1.0625 bytes a weight in int8 in the place of 2, 0.5625 in nf4."""
    settings: dict[str, Any] = {"seq_len": 64, "dtype": "bf16", "gradient_checkpointing": False}
    plans = {kind: plan("preset:tiny", METHODS["galore"], resting=kind, **settings) for kind in (None, *KINDS)}
    weights = {kind: each.split["weights"] for kind, each in plans.items()}
    saved = {"int8": 2 - 1.0625, "nf4": 2 - 0.5625}
    elements = {kind: (weights[None] - weights[kind]) / each for kind, each in saved.items()}
    assert elements["int8"] == pytest.approx(elements["nf4"], rel=1e-3)
    config = plans["nf4"].workload.model
    assert elements["nf4"] == pytest.approx(matrices_of(config), rel=1e-3)


def test_a_plan_for_a_cpu_counts_masters_too() -> None:
    """Host and device are one there, and codes come on top."""
    peaks = {}
    for kind in (None, *KINDS):
        workload = Workload("preset:tiny", METHODS["galore"], seq_len=64, dtype="bf16", resting=kind)
        peaks[kind] = Plan(workload, rehearse(workload)).split["weights"]
    elements = matrices_of("preset:tiny")
    assert peaks["int8"] - peaks[None] == pytest.approx(1.0625 * elements, rel=1e-3)
    assert peaks["nf4"] - peaks[None] == pytest.approx(0.5625 * elements, rel=1e-3)


def matrices_of(preset: str) -> int:
    """Return the elements of the linear layers in a preset's blocks."""
    blocks = empty_model(preset, "bf16").get_submodule("model.layers")
    return sum(module.weight.numel() for module in blocks.modules() if isinstance(module, torch.nn.Linear))


def test_what_cannot_rest_is_refused() -> None:
    model = llama()
    for method, kind, words in (
        (METHODS["galore"], "int4", r"way to rest.*'int4'"),
        (LISA(), "nf4", "trains? layers through slots, and 'lisa' does not"),
        (LoRA(), "int8", "'lora' does not"),
        (OwLore(1, master="remainder"), "int8", "leave one out"),
    ):
        with pytest.raises(InputError, match=words):
            attach(model, method, resting=kind)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight is to rest in few bits and holds a NaN"):
        attach(model, METHODS["galore"], resting="int8")
    assert not resting(model)
