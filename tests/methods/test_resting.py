"""Weights that rest in few bits: their masters learn, are what is saved, and come back as they were."""

from __future__ import annotations

import io
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import anatomy, gemma3, gpt2, llama, logits, tokens, train
from safetensors import safe_open
from torch import Tensor

from lisa_kernels import GaLore, InputError, OwLore, attach, plan
from lisa_kernels.basis import BasisTracker
from lisa_kernels.layers import AccumulatingSlot, RestingLinear
from lisa_kernels.layers import resting as layers
from lisa_kernels.methods import Method, SampledAdamW
from lisa_kernels.ops import resting as ops
from lisa_kernels.ops.resting import KINDS, dequantize_resting_, quantize_resting
from lisa_kernels.plan import Plan
from lisa_kernels.plan.rehearsal import Workload, rehearse
from lisa_kernels.train.empty_model import empty_model

OF_KIND = pytest.mark.parametrize("kind", KINDS)
METHODS: dict[str, Method] = {
    "owlore": OwLore(active_layers=1, period=3, rank=4, scores="uniform", embeddings="frozen"),
    # Refreshes are due in mid-period.
    "owlore-gap": OwLore(active_layers=2, period=7, gap=3, rank=4, scores="uniform"),
    "owlore-keep": OwLore(active_layers=1, period=2, gap=3, rank=4, scores="uniform", retired_state="keep"),
    "owlore-page": OwLore(active_layers=1, period=2, gap=3, rank=4, scores="uniform", retired_state="page"),
    "galore": GaLore(rank=4, gap=3, embeddings="low-rank"),
    "galore-tied": GaLore(rank=4, gap=3, embeddings="low-rank"),
    # Its embedding multiplies what it looks up.
    "galore-gemma": GaLore(rank=4, gap=3, embeddings="low-rank"),
    "owlore-first": OwLore(active_layers=1, period=2, gap=3, rank=4, scores="uniform", embeddings="with-first-block"),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    if name.endswith("gemma"):
        return gemma3(layers=3, hidden_size=64, intermediate_size=96).to(dtype)
    return llama(layers=3, tied=name.endswith("tied"), hidden_size=64, intermediate_size=96).to(dtype)


def start(name: str, kind: str | None, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, SampledAdamW]:
    model = made(name, dtype)
    return model, attach(model, METHODS[name], lr=3e-3, seed=0, resting=kind, **settings)


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
    return dequantize_resting_(torch.empty(layer.matrix.shape), layer.codes, layer.scales, layer.kind)


@OF_KIND
def test_a_layer_computes_with_what_its_codes_mean(kind: str) -> None:
    model, plain = start("galore", kind)[0], made("galore")
    for path, layer in resting(model).items():
        plain.get_submodule(path).weight.data.copy_(woken(layer))
    assert len(resting(model)) == 3 * 7 + 1
    assert torch.equal(logits(model, tokens()), logits(plain, tokens()))


@pytest.mark.parametrize(("name", "kind"), zip(METHODS, itertools.cycle(KINDS)))
def test_masters_learn_what_slots_did(name: str, kind: str) -> None:
    """In float32: what is saved in mid-training is what is there after it, and it is near what 16 bits learn."""
    before = made(name).state_dict()
    ends: list[dict[str, Tensor]] = []
    for how in (kind, None):
        model, optimizer = start(name, how)
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


def bytes_of(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Stands for codes that lose nothing."""
    return weight.reshape(-1).view(torch.uint8).clone(), weight.new_empty((0,))


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_lose_nothing_at_rest_learn_what_folded_ones_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With codes that mean the weight itself, a slot that waits to be settled ends where one does that is folded."""
    monkeypatch.setattr(ops, "quantize_resting", bytes_of)
    monkeypatch.setattr(layers, "quantize_resting", bytes_of)
    monkeypatch.setattr(
        ops, "dequantize_resting_", lambda out, codes, *_: out.copy_(codes.view(out.dtype).view_as(out))
    )
    monkeypatch.setattr(ops, "code_count", lambda elements, kind: 4 * elements)
    monkeypatch.setattr(ops, "scale_count", lambda elements: 0)
    # Some weights in one tile, others in several.
    monkeypatch.setattr(ops, "TILE_ELEMENTS", 64 * 64)
    before, ends = made(name).state_dict(), []
    for kind in ("nf4", None):
        model, optimizer = start(name, kind, rounding="nearest")
        run(model, optimizer, 0, 10)
        if name == "owlore-first":
            # The embedding has trained with the first block, and left with it.
            assert [0] in optimizer.history[:-1]
            assert optimizer.history[-1] != [0]
        ends.append(torch.cat([(end - before[key]).flatten() for key, end in optimizer.detach().state_dict().items()]))
    assert float((ends[0] - ends[1]).norm()) < 2e-3 * float(ends[1].norm())


@OF_KIND
def test_only_the_layers_that_left_rest_anew(kind: str) -> None:
    """Between switches neither masters nor codes move; after one, codes are those of the masters."""
    model, optimizer = start("owlore", kind)
    layers, drawn = resting(model), []
    for period in range(5):
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
            assert torch.equal(quantize_resting(layer.stored_weight.detach(), layer.kind)[0], layer.codes)
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_bit_equal(name: str) -> None:
    """Stopped in mid-period, with slots that are in no master yet."""
    model, optimizer = start(name, "nf4", torch.bfloat16)
    run(model, optimizer, 0, 9)
    stopped, before = start(name, "nf4", torch.bfloat16)
    run(stopped, before, 0, 5)
    weights, state = through_disk(stopped.state_dict()), through_disk(before.state_dict())
    resumed, after = start(name, "nf4", torch.bfloat16)
    resumed.load_state_dict(weights)
    after.load_state_dict(state)
    run(resumed, after, 5, 9)
    for (path, one), other in zip(resting(model).items(), resting(resumed).values()):
        for part in ("stored_weight", "codes", "scales", "kept", "slot", "basis"):
            assert torch.equal(getattr(one, part), getattr(other, part)), (path, part)
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_state_is_loaded_into_weights_that_rest_alike() -> None:
    """Else what is in the slots would be lost."""
    for kind, other in (("nf4", "int8"), ("nf4", None), (None, "nf4")):
        state = start("galore", kind)[1].state_dict()
        with pytest.raises(InputError, match=f"resting='{kind or '16-bit'}'; this run has '{other or '16-bit'}'"):
            start("galore", other)[1].load_state_dict(state)


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


@pytest.mark.parametrize("name", ["galore", "galore-tied"])
def test_weights_loaded_into_an_attached_model_rest(name: str) -> None:
    """A tied one is in files by one of its names."""
    model, optimizer = start(name, "int8")
    run(model, optimizer, 0, 2)
    assert sum(bool(layer.slot.any()) for layer in slots(model)) > 10
    other = {key: value * 1.5 for key, value in made(name).state_dict().items()}
    if name == "galore-tied":
        del other["lm_head.weight"]
    model.load_state_dict(other, strict=False)
    assert torch.equal(model.model.embed_tokens.weight, other["model.embed_tokens.weight"])
    for path, layer in resting(model).items():
        given = other["model.embed_tokens.weight" if path == "lm_head" and "tied" in name else f"{path}.weight"]
        assert torch.equal(layer.stored_weight, given)
        assert torch.equal(layer.codes, quantize_resting(given, "int8")[0])
    assert not any(layer.slot.any() for layer in slots(model))


@pytest.mark.parametrize("name", ["galore", "galore-tied"])
def test_weights_loaded_again_change_nothing(name: str) -> None:
    """What was saved is what a slot and its master make together, and they stay two."""
    model, optimizer = start(name, "int8", torch.bfloat16)
    run(model, optimizer, 0, 2)
    held = [tensor.clone() for layer in slots(model) for tensor in (layer.slot, layer.stored_weight, layer.kept)]
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    now = [tensor for layer in slots(model) for tensor in (layer.slot, layer.stored_weight, layer.kept)]
    assert all(torch.equal(one, other) for one, other in zip(held, now, strict=True))


def slots(model: Any) -> list[AccumulatingSlot]:
    return [module for module in model.modules() if isinstance(module, AccumulatingSlot)]


def test_a_tied_weight_is_saved_once(tmp_path: Path) -> None:
    """With what its slot has learnt, under each of its names; and a folder of it loads as an ordinary model."""
    model, optimizer = start("galore-tied", "nf4")
    run(model, optimizer, 0, 2)
    saved = model.state_dict()
    table = saved["model.embed_tokens.weight"]
    assert saved["lm_head.weight"].data_ptr() == table.data_ptr()
    assert not torch.equal(table, model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).shape == table.shape for name in file.keys()) == 1  # noqa: SIM118
    assert torch.equal(type(model).from_pretrained(tmp_path).lm_head.weight, table)


def test_lookups_add_what_the_slot_has_learnt() -> None:
    """With gradients and without, and while the lookups do not train."""
    model, optimizer = start("galore-gemma", "int8")
    run(model, optimizer, 0, 2)
    embedding, [tap] = model.model.embed_tokens, [swap for swap in optimizer.layout.swaps if hasattr(swap, "tap")]
    ids, head = tokens()["input_ids"], model.lm_head
    wanted = 8.0 * (embedding.weight + head.slot.t() @ head.basis)[ids]
    for rests in (False, True):
        tap.rest(rests)
        looked_up = embedding(ids)
        assert looked_up.requires_grad != rests
        torch.testing.assert_close(looked_up, wanted)
        with torch.no_grad():
            torch.testing.assert_close(embedding(ids), wanted)


def test_masters_stay_where_they_are_when_the_model_moves() -> None:
    model, optimizer = start("galore-gemma", "int8")
    layers = [(layer, layer.stored_weight.data_ptr()) for layer in slots(model)]
    scale = model.model.embed_tokens.embed_scale
    model._apply(torch.clone)
    assert all(layer.stored_weight.data_ptr() == where for layer, where in layers)
    assert model.model.embed_tokens.embed_scale is scale
    assert all(torch.equal(one, other) for one, other in zip(pickled(model).parameters(), model.parameters()))
    assert not {"parameters", "_apply"} & vars(optimizer.detach().model).keys()
    model.to(torch.float64)
    assert {param.dtype for param in model.parameters()} == {torch.float64}


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def test_mixed_has_the_widest_inputs_and_the_head_in_8_bits() -> None:
    model, _ = start("galore", "mixed")
    in_8_bits = {path for path, layer in resting(model).items() if layer.kind == "int8"}
    assert in_8_bits == {"lm_head", *(f"model.layers.{number}.mlp.down_proj" for number in range(3))}


def test_outer_weights_that_never_train_rest_too() -> None:
    """Without slots; a head that is frozen as part of the model, and one that is tied to a table."""
    for name, tied in (("owlore", False), ("owlore", True)):
        model = llama(layers=3, tied=tied, hidden_size=64, intermediate_size=96)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = attach(model, METHODS[name], lr=3e-3, seed=0, resting="nf4")
        run(model, optimizer, 0, 4)
        assert resting(model)["lm_head"].kind in KINDS
        assert torch.equal(model.state_dict()["lm_head.weight"], before["lm_head.weight"])
        end = optimizer.detach().state_dict()
        assert torch.equal(end["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
        assert not resting(model)


@OF_KIND
def test_tiles_settle_as_a_whole_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Master and codes to the bit, under stochastic rounding; of rows that are no whole blocks, too."""
    ends = []
    for elements in (1 << 24, 1 << 8):
        monkeypatch.setattr(ops, "TILE_ELEMENTS", elements)
        torch.manual_seed(0)
        plain = torch.nn.Linear(40, 70, bias=False, dtype=torch.bfloat16)
        layer = RestingLinear(plain, 4, kind, BasisTracker(rank=4, gap=3, offset=0, seed=0, stream=1), "layer")
        layer.activate(torch.randn(4, 40))
        layer.slot.data.normal_()
        merged = layer.add_slot_(layer.stored_weight.detach().clone())
        layer.settle(torch.tensor(12345))
        ends.append([merged, layer.stored_weight, layer.codes, layer.scales])
        whole = quantize_resting(layer.stored_weight.detach(), kind)
        assert torch.equal(layer.codes, whole[0])
        assert torch.equal(layer.scales, whole[1])
    assert all(torch.equal(one, other) for one, other in zip(*ends))


def test_code_that_goes_past_a_layer_multiplies_by_what_it_computes_with() -> None:
    """Within a forward; outside of one the weight is the master."""
    model, optimizer = start("galore", "nf4")
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
    """Of each matrix 1.0176 bytes a weight in int8 in the place of 2, in blocks 0.5176 in nf4; of the table nothing."""
    settings: dict[str, Any] = {"seq_len": 64, "dtype": "bf16", "gradient_checkpointing": False}
    plans = {kind: plan("preset:tiny", METHODS["galore"], resting=kind, **settings) for kind in (None, *KINDS)}
    weights = {kind: each.split["weights"] for kind, each in plans.items()}
    inside, head, table = elements_of("preset:tiny")
    for kind, size in (("int8", 1.0176), ("nf4", 0.5176)):
        gained = (2 - size) * inside + (2 - 1.0176) * head + 2 * table
        assert weights[None] - weights[kind] == pytest.approx(gained, rel=1e-3)


def test_a_plan_for_a_cpu_counts_masters_too() -> None:
    """Host and device are one there, and codes come on top."""
    peaks = {}
    for kind in (None, "nf4"):
        workload = Workload("preset:tiny", METHODS["galore"], seq_len=64, dtype="bf16", resting=kind)
        peaks[kind] = Plan(workload, rehearse(workload)).split["weights"]
    inside, head, _ = elements_of("preset:tiny")
    assert peaks["nf4"] - peaks[None] == pytest.approx(0.5176 * inside + 1.0176 * head, rel=1e-3)


def elements_of(preset: str) -> tuple[int, int, int]:
    """Return the elements of the linears in a preset's blocks, of its head, and of a table that is not the head's."""
    model = empty_model(preset, "bf16")
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    linears = [layer for layer in model.get_submodule("model.layers").modules() if isinstance(layer, torch.nn.Linear)]
    return sum(layer.weight.numel() for layer in linears), head.numel(), 0 if table is head else table.numel()


def test_what_cannot_rest_is_refused() -> None:
    model = llama()
    for method, kind, words in (
        (METHODS["galore"], "int4", r"way to rest.*'int4'"),
        (OwLore(1, master="remainder"), "int8", "leave one out"),
    ):
        with pytest.raises(InputError, match=words):
            attach(model, method, resting=kind)
    for path in ("model.layers.1.mlp.up_proj", "lm_head"):
        model = llama()
        before = anatomy(model)
        model.get_submodule(path).weight.data[3, 3] = torch.nan
        with pytest.raises(InputError, match=f"{path}.weight is to rest in few bits and holds a NaN"):
            attach(model, METHODS["galore"], resting="int8")
        assert anatomy(model) == before
