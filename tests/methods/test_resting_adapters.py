"""Adapters beside weights that rest: they learn there, and are merged into masters that no step has touched."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ADAPTED, anatomy, gpt2, llama, logits, tokens, train
from tolerances import PRODUCT
from torch import Tensor

from lisa_kernels import InputError, LoRA, LoRAFA, OwLore, attach, plan
from lisa_kernels.layers import AccumulatingSlot, RestingLinear, TrainedBasisLinear
from lisa_kernels.methods import Method, SampledAdamW
from lisa_kernels.ops.resting import KINDS, dequantize_resting_, quantize_resting
from lisa_kernels.plan import Plan
from lisa_kernels.plan.rehearsal import Workload, rehearse

OF_KIND = pytest.mark.parametrize("kind", KINDS)
METHODS: dict[str, Method] = {
    "lora": LoRA(rank=4, alpha=8),
    "lora-embeddings": LoRA(rank=4, alpha=8, embeddings="low-rank"),
    "lora-targets": LoRA(rank=4, alpha=8, targets=("q_proj", "v_proj")),
    "lora-fa": LoRAFA(rank=4, alpha=8),
}
OF_METHOD = pytest.mark.parametrize("name", METHODS)


def made(dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    return llama(layers=2, tied=tied, hidden_size=64, intermediate_size=96).to(dtype)


def start(
    name: str, kind: str | None, dtype: torch.dtype = torch.float32, steps: int = 0, **settings: Any
) -> tuple[Any, SampledAdamW]:  # fmt: skip
    model = made(dtype)
    optimizer = attach(model, METHODS[name], lr=1e-2, seed=0, resting=kind, **settings)
    run(model, optimizer, 0, steps)
    return model, optimizer


def run(model: Any, optimizer: SampledAdamW, first: int, last: int) -> None:
    for step in range(first, last):
        train(model, optimizer, tokens(1, 6, seed=step))


def resting(model: Any) -> dict[str, RestingLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, RestingLinear)}


def adapters(model: Any) -> dict[str, RestingLinear]:
    return {path: layer for path, layer in resting(model).items() if layer.tracker is None}


def woken(layer: RestingLinear) -> Tensor:
    return dequantize_resting_(torch.empty(layer.matrix.shape), layer.codes, layer.scales, layer.kind)


class Defined(torch.nn.Module):
    """An adapter in torch's own operations, beside what the codes of a resting layer mean."""

    def __init__(self, layer: RestingLinear) -> None:
        super().__init__()
        self.base, self.bias, self.scale = woken(layer), layer.bias, layer.scale
        self.a = torch.nn.Parameter(layer.basis.detach().clone())
        self.b = torch.nn.Parameter(layer.slot.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.base, self.bias) + self.scale * (x @ self.a.t()) @ self.b


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_loss_and_gradients_are_those_of_the_definition(kind: str, make: Callable[[], Any]) -> None:
    """At the start, where A's gradient is zero, and after steps; nothing else gets one."""
    for method, steps in ((LoRA(rank=4, alpha=8), 0), (LoRA(rank=4, alpha=8), 3), (LoRAFA(rank=4, alpha=8), 2)):
        model, plain = make(), make()
        optimizer = attach(model, method, lr=1e-2, seed=0, resting=kind)
        for seed in range(steps):
            train(model, optimizer, tokens(seed=seed))
        for path, layer in resting(model).items():
            if layer.tracker is None:
                plain.set_submodule(path, Defined(layer))
            else:
                # A tied table stays what it is for lookups.
                head = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
                head.weight.data.copy_(woken(layer))
                plain.set_submodule(path, head)
        losses = [each.train()(**tokens(seed=9)).loss for each in (model, plain)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
        assert len(adapters(model)) > 4
        for path, layer in adapters(model).items():
            defined = plain.get_submodule(path)
            pairs = [(layer.slot.grad, defined.b.grad)]
            if isinstance(layer, TrainedBasisLinear):
                pairs.append((layer.basis.grad, defined.a.grad))
                assert bool(defined.a.grad.any()) == (steps > 0)
            for ours, wanted in pairs:
                torch.testing.assert_close(ours, wanted, rtol=0, atol=20 * PRODUCT * float(wanted.norm()))
        held = {id(param) for param in optimizer.layout.always.params()}
        assert all(param.grad is None for param in model.parameters() if id(param) not in held)


@OF_METHOD
def test_masters_wait_for_the_adapters_to_be_merged(name: str) -> None:
    """Codes and masters of adapters do not move in training; saved and detached are masters with the adapters."""
    model = made()
    before, shape = saved(model), anatomy(model)
    optimizer = attach(model, METHODS[name], lr=1e-2, seed=0, resting="nf4")
    beneath = {path: (layer.stored_weight.clone(), layer.codes.clone()) for path, layer in adapters(model).items()}
    run(model, optimizer, 0, 4)
    for path, layer in adapters(model).items():
        assert torch.equal(layer.stored_weight, beneath[path][0])
        assert torch.equal(layer.codes, beneath[path][1])
    expected = {
        f"{path}.weight": layer.stored_weight + layer.scale * layer.slot.t() @ layer.basis
        for path, layer in adapters(model).items()
    }
    learnt = saved(model)
    assert set(learnt) == set(before)
    end = optimizer.detach().state_dict()
    assert anatomy(model) == shape
    assert not resting(model)
    assert all(torch.equal(end[key], learnt[key]) for key in learnt)
    for key, value in expected.items():
        torch.testing.assert_close(end[key], value.detach(), rtol=1e-6, atol=1e-7)
        assert not torch.equal(end[key], before[key])
    others = {key for key in end if not torch.equal(end[key], before[key])} - expected.keys()
    outer = {"model.embed_tokens.weight", "lm_head.weight"}
    assert others == (outer if name == "lora-embeddings" else set())


@OF_METHOD
def test_all_matrices_rest_and_only_adapters_train(name: str) -> None:
    """Those that no target names too, and embedding and head, with a slot or without."""
    model, optimizer = start(name, "mixed")
    kinds = {path: layer.kind for path, layer in resting(model).items()}
    assert len(kinds) == 2 * 7 + 1
    assert {path for path, kind in kinds.items() if kind == "int8"} == {
        "lm_head", *(f"model.layers.{number}.mlp.down_proj" for number in range(2))
    }  # fmt: skip
    count = 4 if name == "lora-targets" else 14
    assert len(adapters(model)) == count
    groups = {group["name"]: len(group["params"]) for group in optimizer.param_groups}
    assert (
        groups
        == {
            "lora": {"slots": 14, "bases": 14},
            "lora-embeddings": {"slots": 14, "bases": 14, "folded": 2},
            "lora-targets": {"slots": 4, "bases": 4},
            "lora-fa": {"slots": 14},
        }[name]
    )


@pytest.mark.parametrize("name", ["lora", "lora-fa", "lora-embeddings"])
def test_adapters_learn_what_they_do_beside_16_bits(name: str) -> None:
    """In 8 bits nearly the same; all of it starts from equal factors."""
    ends = []
    for kind in ("int8", None):
        model, optimizer = start(name, kind)
        before = saved(model)
        if kind is not None:
            first = [(layer.slot.clone(), layer.basis.clone()) for layer in adapters(model).values()]
        else:
            others = [module for module in model.modules() if hasattr(module, "tracker") and module.tracker is None]
            for (slot, basis), layer in zip(first, others, strict=True):
                assert torch.equal(slot, layer.slot)
                assert torch.equal(basis, layer.basis)
        run(model, optimizer, 0, 8)
        end = optimizer.detach().state_dict()
        ends.append(torch.cat([(end[key] - before[key]).flatten() for key in before]))
    assert float(torch.nn.functional.cosine_similarity(*ends, dim=0)) > 0.9


def test_merged_layers_compute_with_codes_of_the_sum() -> None:
    """And come apart to the bit, in bfloat16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = start("lora", "nf4", dtype, steps=3)
        before, out = saved(model), logits(model)
        held = [
            tensor.clone()
            for layer in adapters(model).values()
            for tensor in (layer.slot, layer.basis, layer.stored_weight, layer.codes, layer.scales)
        ]
        optimizer.merge()
        assert all(torch.equal(value, before[key]) for key, value in saved(model).items())
        for layer in adapters(model).values():
            assert torch.equal(layer.codes, quantize_resting(layer.stored_weight.detach(), "nf4")[0])
        assert not torch.equal(logits(model), out)
        with pytest.raises(InputError, match="merged"):
            optimizer.step()
        optimizer.unmerge()
        assert torch.equal(logits(model), out)
        now = [
            tensor
            for layer in adapters(model).values()
            for tensor in (layer.slot, layer.basis, layer.stored_weight, layer.codes, layer.scales)
        ]
        assert all(torch.equal(one, other) for one, other in zip(held, now, strict=True))
        optimizer.merge()
        optimizer.detach()
        assert all(torch.equal(value, before[key]) for key, value in saved(model).items())


@pytest.mark.parametrize("name", ["lora", "lora-fa"])
def test_a_folder_of_adapters_is_one_of_peft(name: str, tmp_path: Path) -> None:
    """A model that peft loads it into computes what the detached one does, and one attached anew what this one does."""
    import peft

    model, optimizer = start(name, "nf4", steps=3)
    optimizer.save_adapter(tmp_path / "adapter")
    out = logits(model)
    theirs = peft.PeftModel.from_pretrained(made(), tmp_path / "adapter")
    again, other = start(name, "nf4")
    other.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(logits(again), out, rtol=1e-4, atol=1e-5)
    optimizer.detach()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model), out, rtol=1e-4, atol=1e-5)


def saved(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def through_disk(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@OF_METHOD
def test_a_resumed_run_is_bit_equal(name: str) -> None:
    model, _ = start(name, "nf4", torch.bfloat16, steps=6)
    stopped, before = start(name, "nf4", torch.bfloat16, steps=3)
    weights, state = through_disk(stopped.state_dict()), through_disk(before.state_dict())
    resumed, after = start(name, "nf4", torch.bfloat16)
    resumed.load_state_dict(weights)
    after.load_state_dict(state)
    run(resumed, after, 3, 6)
    for (path, one), other in zip(resting(model).items(), resting(resumed).values(), strict=True):
        for part in ("stored_weight", "codes", "scales", "slot", "basis"):
            assert torch.equal(getattr(one, part), getattr(other, part)), (path, part)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in model.state_dict().items())


def test_weights_loaded_into_an_attached_model_rest() -> None:
    """Adapters begin anew, for what is loaded holds them."""
    model, optimizer = start("lora-embeddings", "int8", steps=2)
    held = [layer.slot.clone() for layer in adapters(model).values()]
    model.load_state_dict(saved(model))
    assert all(torch.equal(layer.slot, slot) for layer, slot in zip(adapters(model).values(), held))
    other = {key: value * 1.5 for key, value in made().state_dict().items()}
    model.load_state_dict(other)
    for path, layer in resting(model).items():
        assert torch.equal(layer.stored_weight, other[f"{path}.weight"])
        assert torch.equal(layer.codes, quantize_resting(other[f"{path}.weight"], "int8")[0])
    assert not any(module.slot.any() for module in model.modules() if isinstance(module, AccumulatingSlot))
    with pytest.raises(InputError, match="the embeddings were trained"):
        optimizer.save_adapter("nowhere")


def test_masters_stay_where_they_are_when_the_model_moves() -> None:
    model, _ = start("lora", "int8", steps=1)
    layers = [(layer, layer.stored_weight.data_ptr(), layer.slot.data_ptr()) for layer in adapters(model).values()]
    model._apply(torch.clone)
    assert all(layer.stored_weight.data_ptr() == where for layer, where, _ in layers)
    assert all(layer.slot.data_ptr() != where and layer.basis.requires_grad for layer, _, where in layers)


@OF_METHOD
def test_evaluation_computes_as_training_does(name: str) -> None:
    """With resting weights and adapters, with gradients and without."""
    model, _ = start(name, "nf4", steps=2)
    out = logits(model.train())
    with torch.no_grad():
        assert torch.equal(logits(model.eval()), out)


def test_a_linear_of_a_block_that_was_frozen_rests_beside_those_that_train() -> None:
    """Whatever the method; it is what it was afterwards."""
    model = made()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    before = saved(model)
    with pytest.warns(UserWarning, match="frozen before attaching"):
        optimizer = attach(model, OwLore(1, 2, rank=4, scores="uniform", embeddings="frozen"), resting="nf4")
    run(model, optimizer, 0, 4)
    assert len(resting(model)) == 2 * 7 + 1
    end = optimizer.detach().state_dict()
    assert torch.equal(end["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])
    assert not resting(model)


@pytest.mark.slow
def test_a_plan_counts_codes_and_adapters() -> None:
    """A weight is its code's bytes, an adapter the four of each number, and beside a host's codes are their masters."""
    settings: dict[str, Any] = {"seq_len": 64, "dtype": "bf16", "gradient_checkpointing": False}
    plans = {kind: plan("preset:tiny", METHODS["lora"], resting=kind, **settings) for kind in (None, "nf4")}
    assert plans[None].split["bases"] == plans["nf4"].split["bases"] > 0
    model = made_empty()
    inside = sum(layer.weight.numel() for layer in model.get_submodule("model.layers").modules() if is_linear(layer))
    head, table = model.lm_head.weight.numel(), model.model.embed_tokens.weight.numel()
    gained = (2 - 0.5176) * inside + (2 - 1.0176) * head + 2 * table
    assert plans[None].split["weights"] - plans["nf4"].split["weights"] == pytest.approx(gained, rel=1e-3)


@pytest.mark.parametrize("name", ["lora-embeddings", "lora-fa"])
def test_a_plan_knows_each_byte_that_is_held(name: str) -> None:
    """On a CPU, where masters are beside the codes."""
    from lisa_kernels.train.models import load_model

    workload = Workload("preset:tiny", METHODS[name], seq_len=64, dtype="bf16", resting="mixed")
    split = Plan(workload, rehearse(workload)).split
    model = load_model("preset:tiny", torch.bfloat16, 0)
    attach(model, METHODS[name], resting="mixed")
    slots = [tensor for layer in adapters(model).values() for tensor in (layer.slot, layer.basis)]
    beside = [
        tensor
        for layer in model.modules()
        if isinstance(layer, AccumulatingSlot) and layer.tracker is not None
        for tensor in (layer.slot, layer.basis)
    ]
    own = {id(tensor) for tensor in (*slots, *beside)}
    weights = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in own]
    assert split["weights"] == sum(tensor.nbytes for tensor in weights)
    assert split["bases"] == sum(tensor.nbytes for tensor in (*slots, *beside))


def is_linear(layer: Any) -> bool:
    return isinstance(layer, torch.nn.Linear)


def made_empty() -> Any:
    from lisa_kernels.train.empty_model import empty_model

    return empty_model("preset:tiny", "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("family", ADAPTED)
@pytest.mark.parametrize("resting", ["nf4", "mixed", "60kB"])
def test_every_family_learns_beside_weights_that_rest(family: str, resting: str) -> None:
    """A model is detached as what its state said, and computed with fewer bits before."""
    model, batch = ADAPTED[family].make(), ADAPTED[family].batch()
    optimizer = attach(model, LoRA(rank=4), lr=1e-2, resting=resting, calibration=[batch])
    assert len(adapters(model)) > 8
    losses = [train(model, optimizer, batch) for _ in range(6)]
    assert losses[-1] < losses[0]
    learnt = saved(model)
    end = optimizer.detach().state_dict()
    assert all(torch.equal(end[key], value) for key, value in learnt.items())


def test_what_cannot_rest_is_refused_and_leaves_the_model_as_it_was() -> None:
    for path in ("model.layers.1.mlp.up_proj", "lm_head"):
        model = made()
        before = anatomy(model)
        model.get_submodule(path).weight.data[3, 3] = torch.nan
        with pytest.raises(InputError, match=f"{path}.weight is to rest in few bits and holds a NaN"):
            attach(model, METHODS["lora-targets"], resting="int8")
        assert anatomy(model) == before
