"""Layers that are drawn on their masters, beside others at rest, learn what they would in a model of 16 bits."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from families import anatomy, gpt2, llama, tokens, train
from torch import Tensor

from lisa_kernels import LISA, OWS, BAdam, FullFineTune, GaLore, InputError, OwLore, attach
from lisa_kernels.layers import RestingLinear, WokenLinear
from lisa_kernels.methods import Method, SampledAdamW
from lisa_kernels.ops.resting import dequantize_resting_, quantize_resting

METHODS: dict[str, Method] = {
    "lisa": LISA(2, 3),
    "lisa-frozen": LISA(1, 2, embeddings="frozen"),
    "lisa-keep": LISA(1, 2, retired_state="keep"),
    "lisa-page": LISA(1, 2, retired_state="page"),
    "ows": OWS(1, 2, scores="weight-norm", embeddings="with-first-block", rank=4),
    "ows-adaptive": OWS(1, 2, scores="gradient-norm"),
    "badam": BAdam(2),
    "owlore-always": OwLore(1, 3, rank=4, gap=2, scores="uniform", embeddings="always"),
    "owlore": OwLore(2, 4, rank=4, gap=3, scores="uniform"),
    "owlore-frozen": OwLore(1, 3, rank=4, gap=2, scores="uniform", embeddings="frozen", retired_state="keep"),
    "owlore-page": OwLore(1, 2, rank=4, scores="uniform", retired_state="page"),
}
OFTEN = ("lisa-page", "owlore")
RESUMED = ("lisa-keep", "lisa-page", "ows", "badam", "owlore", "owlore-frozen", "owlore-page")
STEPS = 8
BF16, FP32 = torch.bfloat16, torch.float32


def made(name: str = "", dtype: torch.dtype = torch.float32) -> Any:
    if name.endswith("gpt2"):
        return gpt2().to(dtype)
    return llama(layers=4, tied=name.endswith("tied"), hidden_size=64, intermediate_size=96).to(dtype)


def start(
    method: Method, kind: str | None, dtype: torch.dtype = torch.float32, family: str = "", **settings: Any
) -> tuple[Any, SampledAdamW]:
    model = made(family, dtype)
    on = "master" if kind and method.form == "low-rank" else None
    return model, attach(model, method, lr=3e-3, seed=0, resting=kind, active_on=on, **settings)


def woken(model: Any) -> dict[str, WokenLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, WokenLinear)}


class Reference:
    """A run in 16 bits in which the matrices of blocks that do not train are what codes of their masters mean."""

    def __init__(self, method: Method, kind: str, **settings: Any) -> None:
        self.kind = kind
        self.model, self.optimizer = start(method, None, **settings)
        self.masters = {
            name: param.detach().clone()
            for name, param in self.model.named_parameters()
            if "layers." in name and name.endswith("_proj.weight")
        }
        self.active: list[int] = []
        self.settle()

    def settle(self) -> None:
        """Do what a switch does: those that left are masters now, those that come are on them."""
        params = dict(self.model.named_parameters())
        for name, master in self.masters.items():
            number = int(name.split(".")[2])
            if number in self.active:
                master.copy_(params[name].detach())
            now = master if number in self.optimizer.active_layers else self.at_rest(master)
            params[name].data.copy_(now)
        self.active = self.optimizer.active_layers

    def at_rest(self, master: Tensor) -> Tensor:
        codes, scales = quantize_resting(master, self.kind)
        return dequantize_resting_(torch.empty_like(master), codes, scales, self.kind)

    def run(self, first: int, last: int) -> None:
        for step in range(first, last):
            train(self.model, self.optimizer, tokens(1, 6, seed=step))
            self.settle()

    def end(self) -> dict[str, Tensor]:
        """Return what the model has learnt."""
        self.active = self.optimizer.active_layers
        state = {key: value.clone() for key, value in self.model.state_dict().items()}
        for name, master in self.masters.items():
            if int(name.split(".")[2]) not in self.active:
                state[name] = master
        return state


def run(model: Any, optimizer: SampledAdamW, first: int, last: int) -> None:
    for step in range(first, last):
        train(model, optimizer, tokens(1, 6, seed=step))


@pytest.mark.parametrize(
    ("name", "kind", "dtype"), [("lisa", "int8", BF16), ("ows-adaptive", "nf4", FP32), ("owlore-always", "int8", BF16)]
)
def test_drawn_layers_learn_what_they_do_beside_weights_that_codes_mean(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    """To the bit, over several switches."""
    reference = Reference(METHODS[name], kind, dtype=dtype)
    reference.run(0, STEPS)
    model, optimizer = start(METHODS[name], kind, dtype)
    run(model, optimizer, 0, STEPS)
    assert optimizer.history == reference.optimizer.history
    assert len({tuple(drawn) for drawn in optimizer.history}) > 1
    end = reference.end()
    for key, value in model.state_dict().items():
        assert torch.equal(value, end[key]), key
    for key, value in optimizer.detach().state_dict().items():
        assert torch.equal(value, end[key]), key


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "cast"), [("lisa-page", "nf4", FP32, True), ("ows-adaptive", "int8", BF16, False)]
)
def test_evaluation_and_autocast_read_what_codes_mean(name: str, kind: str, dtype: torch.dtype, cast: bool) -> None:
    """To the bit: forwards without gradients, beside them in evaluation, and what is generated, between two backwards.

    None of it disturbs a switch or a gradient.
    """
    reference = Reference(METHODS[name], kind, dtype=dtype)
    model, optimizer = start(METHODS[name], kind, dtype)
    for step in range(4):
        expected, found = (
            evaluated_step(*pair, step, cast) for pair in ((reference.model, reference.optimizer), (model, optimizer))
        )
        reference.settle()
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(value, found[key]), (step, key)
    assert len({tuple(drawn) for drawn in optimizer.history}) > 1
    end = reference.end()
    for key, value in model.state_dict().items():
        assert torch.equal(value, end[key]), key


def evaluated_step(model: Any, optimizer: SampledAdamW, step: int, cast: bool) -> dict[str, Tensor]:
    """Take a step of two backwards with evaluation between; return all that was computed, gradients by their names."""
    found: dict[str, Tensor] = {}
    asked = {"input_ids": tokens(2, 5, seed=99)["input_ids"]}
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        for half in range(2):
            found[f"loss {half}"] = loss = model(**tokens(1, 6, seed=2 * step + half)).loss
            loss.backward()
            if half == 0:
                model.eval()
                for name, mode in (("no_grad", torch.no_grad), ("inference", torch.inference_mode)):
                    with mode():
                        found[name] = model(**asked).logits
                found["with gradients"] = model(**asked).logits
                found["generated"] = model.generate(**asked, max_new_tokens=3, do_sample=False, pad_token_id=0)
                model.train()
    found |= {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    return found


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in RESUMED]
)
def test_a_resumed_run_is_bit_equal(name: str) -> None:
    """Stopped in mid-period, with layers awake whose weights are in no code; what rests has codes of its master."""
    model, optimizer = start(METHODS[name], "nf4", BF16)
    run(model, optimizer, 0, 7)
    stopped, before = start(METHODS[name], "nf4", BF16)
    run(stopped, before, 0, 5)
    weights, state = through_disk(stopped.state_dict()), through_disk(before.state_dict())
    resumed, after = start(METHODS[name], "nf4", BF16)
    resumed.load_state_dict(weights)
    after.load_state_dict(state)
    check_rests(resumed, after)
    run(resumed, after, 5, 7)
    check_rests(resumed, after)
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def check_rests(model: Any, optimizer: SampledAdamW) -> None:
    """Check that just the layers that do not train rest, in codes of their masters."""
    awake = {layer for unit in optimizer._active_units() for layer in unit.woken}
    layers = woken(model)
    assert awake
    assert len(layers) == 28
    for path, layer in layers.items():
        assert layer.awake == (layer in awake), path
        codes, scales = quantize_resting(layer.stored_weight.detach(), layer.kind)
        assert torch.equal(layer.codes, codes[:0] if layer.awake else codes), path
        assert torch.equal(layer.scales, scales[:0] if layer.awake else scales), path
        assert layer.awake or layer.stored_weight.grad is None


def through_disk(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("family", ["gpt2", "tied"])
def test_what_is_saved_is_what_was_learnt(family: str) -> None:
    """Of weights that are stored the other way round, and beside a head that is tied to the table."""
    before = made(family).state_dict()
    model, optimizer = start(LISA(1, 2), "int8", family=family)
    run(model, optimizer, 0, 5)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    end = optimizer.detach().state_dict()
    assert not woken(model)
    assert saved.keys() == end.keys() == before.keys()
    assert all(torch.equal(saved[key], end[key]) for key in end)
    blocks = {key.split(".")[2] for key in end if ".h." in key or ".layers." in key if (end[key] != before[key]).any()}
    assert len(blocks) == len(
        {number for drawn in optimizer.history[:-1] for number in drawn} | set(optimizer.history[-1])
    )


@pytest.mark.parametrize("name", ["lisa-frozen", "owlore"])
def test_masters_in_files_are_written_when_layers_leave(name: str, tmp_path: Path) -> None:
    """And end as those in memory do, a resumed run's as well."""
    model, optimizer = start(METHODS[name], "nf4", BF16)
    run(model, optimizer, 0, 7)
    for stop in (7, 5):
        other, its = start(METHODS[name], "nf4", BF16, masters=tmp_path / "masters")
        run(other, its, 0, stop)
        assert its.master_bytes_written > 0
        if stop < 7:
            weights, state = through_disk(other.state_dict()), through_disk(its.state_dict())
            its.detach()
            other, its = start(METHODS[name], "nf4", BF16, masters=tmp_path / "masters")
            other.load_state_dict(weights)
            its.load_state_dict(state)
            run(other, its, stop, 7)
        check_rests(other, its)
        end = {key: value.clone() for key, value in other.state_dict().items()}
        plain = its.detach().state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(value, end[key]), key
            if name == "lisa-frozen":
                assert torch.equal(value, plain[key]), key


@pytest.mark.parametrize("name", ["lisa-frozen", "owlore"])
def test_codes_that_are_streamed_mean_the_same(name: str) -> None:
    """Of a block that is awake none are asked for."""
    ends = []
    for where in ("device", "host"):
        model, optimizer = start(METHODS[name], "nf4", BF16, resting_where=where)
        run(model, optimizer, 0, 7)
        ends.append(model.state_dict())
    assert all(map(torch.equal, ends[0].values(), ends[1].values()))


def test_weights_loaded_into_an_attached_model_rest_or_train() -> None:
    model, optimizer = start(METHODS["lisa"], "int8")
    run(model, optimizer, 0, 2)
    other = {key: value * 1.5 for key, value in made().state_dict().items()}
    model.load_state_dict(other)
    check_rests(model, optimizer)
    assert all(torch.equal(value, other[key]) for key, value in model.state_dict().items())


def test_a_layer_that_is_frozen_rests_always_and_one_that_is_shared_never() -> None:
    model = made()
    layers = model.model.layers
    layers[1].mlp.up_proj.weight.requires_grad_(False)
    layers[2].mlp.up_proj.weight = layers[3].mlp.up_proj.weight
    with pytest.warns(UserWarning, match=r"1 parameters \(first: model.layers.1.mlp.up_proj.weight\) were frozen"):
        optimizer = attach(model, LISA(2, 2), lr=1e-3, resting="nf4")
    assert {f"model.layers.{number}.mlp.up_proj" for number in range(4)} - woken(model).keys() == {
        f"model.layers.{number}.mlp.up_proj" for number in (1, 2, 3)
    }
    kinds = [type(model.model.layers[number].mlp.up_proj) for number in (1, 2)]
    assert kinds == [RestingLinear, torch.nn.Linear]
    run(model, optimizer, 0, 5)


def test_mixed_has_the_widest_inputs_of_a_block_in_8_bits() -> None:
    model, _ = start(METHODS["lisa-frozen"], "mixed")
    in_8_bits = {path for path, layer in woken(model).items() if layer.kind == "int8"}
    assert in_8_bits == {f"model.layers.{number}.mlp.down_proj" for number in range(4)}


def test_masters_stay_and_what_is_awake_moves_with_the_model() -> None:
    """A moved layer returns to its master in the same place."""
    model, optimizer = start(METHODS["lisa-frozen"], "int8")
    layers = list(woken(model).values())
    homes = [layer.stored_weight.data_ptr() for layer in layers]
    model._apply(torch.clone)
    assert all((layer.stored_weight.data_ptr() == home) != layer.awake for layer, home in zip(layers, homes))
    run(model, optimizer, 0, 2)
    model._apply(torch.clone)
    model._apply(lambda tensor: tensor)
    run(model, optimizer, 2, 4)
    end = {key: value.clone() for key, value in model.state_dict().items()}
    plain = optimizer.detach()
    assert [layer.stored_weight.data_ptr() for layer in layers] == homes
    other, its = start(METHODS["lisa-frozen"], "int8")
    run(other, its, 0, 4)
    for key, value in other.state_dict().items():
        assert torch.equal(value, end[key])
        assert torch.equal(value, plain.state_dict()[key])


def test_what_cannot_be_active_on_what_is_refused() -> None:
    model = made()
    before = anatomy(model)
    for method, resting, on, words in (
        (LISA(), "int8", "codes", "'lisa' trains the weights themselves, which codes cannot"),
        (LISA(), "int8", "slots", r"active_on.*'slots'"),
        (LISA(), None, "master", "active_on='master' is for weights that rest"),
        (OwLore(), "16-bit", "codes", "active_on='codes' is for weights that rest"),
        (GaLore(), "nf4", "master", "'galore' trains all layers always: on their masters none would rest"),
        (FullFineTune(), "nf4", None, "or draw them, and 'full' does neither"),
    ):
        with pytest.raises(InputError, match=words):
            attach(model, method, resting=resting, active_on=on)
    assert anatomy(model) == before


def test_a_state_is_loaded_where_layers_train_alike() -> None:
    method = METHODS["owlore"]
    for one, other in (("codes", "master"), ("master", "codes")):
        state = attach(made(), method, resting="nf4", active_on=one).state_dict()
        with pytest.raises(InputError, match=f"active_on='{one}'; this run has '{other}'"):
            attach(made(), method, resting="nf4", active_on=other).load_state_dict(state)
