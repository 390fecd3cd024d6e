"""Run N = run k, save, load into a fresh attachment, run N − k: bit-equal weights, states, bases and draws."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from families import anatomy, llama, snapshot, tokens, train
from torch import Tensor

from lisa_kernels import LISA, OWS, BAdam, FullFineTune, GaLore, InputError, LoRA, LoRAFA, OwLore, attach
from lisa_kernels.methods import Method, SampledAdamW

STEPS, STOP = 9, 5

METHODS: dict[str, Method] = {
    "lisa": LISA(active_layers=2, period=4),
    "lisa-keep": LISA(active_layers=1, period=2, retired_state="keep"),
    "lisa-sampled": LISA(active_layers=2, period=2, embeddings="sampled"),
    # The stop is in mid-period, with refreshes due before, at and after it.
    "owlore": OwLore(active_layers=2, period=7, gap=3, rank=4, scores="weight-norm"),
    "owlore-low-rank": OwLore(active_layers=1, period=2, gap=3, rank=4, scores="uniform", embeddings="low-rank"),
    "owlore-with-first-block": OwLore(
        active_layers=1, period=2, gap=3, rank=4, scores="uniform", embeddings="with-first-block"
    ),
    "lisa-low-rank": LISA(active_layers=1, period=4, rank=4, embeddings="low-rank"),
    "owlore-keep": OwLore(active_layers=1, period=2, gap=3, rank=4, scores="uniform", retired_state="keep"),
    "ows-gradient-norm": OWS(active_layers=1, period=3, scores="gradient-norm"),
    "badam": BAdam(period=2),
    "galore": GaLore(rank=4, gap=3),
    "lora": LoRA(rank=4),
    "lora-fa": LoRAFA(rank=4),
    "full": FullFineTune(),
}


def start(method: Method, dtype: torch.dtype = torch.float32, seed: int = 5) -> tuple[Any, SampledAdamW]:
    model = llama(layers=3, hidden_size=64, intermediate_size=96).to(dtype)
    return model, attach(model, method, lr=3e-3, seed=seed)


def run(model: Any, optimizer: SampledAdamW, first: int, last: int) -> None:
    for step in range(first, last):
        train(model, optimizer, tokens(1, 6, seed=step))


def through_disk(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(left: Any, right: Any, where: str = "state") -> None:
    """Assert that two trees are equal, tensors bit for bit and with their dtypes."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (one, other) in enumerate(zip(left, right)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    else:
        assert left == right, where


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_bit_equal(name: str) -> None:
    """Weights, optimizer state, bases, active layers, visits and history are those of the run that was not stopped."""
    model, optimizer = start(METHODS[name])
    run(model, optimizer, 0, STEPS)
    stopped, before = start(METHODS[name])
    run(stopped, before, 0, STOP)
    weights, state = through_disk(stopped.state_dict()), through_disk(before.state_dict())
    # Another seed: the state brings its own.
    resumed, after = start(METHODS[name], seed=99)
    resumed.load_state_dict(weights)
    after.load_state_dict(state)
    assert after.active_layers == before.active_layers
    assert_same(after.state_dict(), before.state_dict())
    run(resumed, after, STOP, STEPS)
    assert_same(snapshot(resumed), snapshot(model))
    assert_same(after.state_dict(), optimizer.state_dict())
    assert after.history == optimizer.history
    after.detach()
    optimizer.detach()
    assert_same(dict(resumed.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("name", ["owlore", "lisa"])
def test_a_resumed_run_is_bit_equal_in_bfloat16(name: str) -> None:
    """Stochastic rounding of weights goes on with the same random numbers."""
    model, optimizer = start(METHODS[name], torch.bfloat16)
    run(model, optimizer, 0, 6)
    stopped, before = start(METHODS[name], torch.bfloat16)
    run(stopped, before, 0, 3)
    resumed, after = start(METHODS[name], torch.bfloat16, seed=1)
    resumed.load_state_dict(through_disk(stopped.state_dict()))
    after.load_state_dict(through_disk(before.state_dict()))
    run(resumed, after, 3, 6)
    assert_same(snapshot(resumed), snapshot(model))


def test_dropping_the_bases_breaks_the_equality() -> None:
    """Negative control: a resume that does not restore bases ends elsewhere."""
    model, optimizer = start(METHODS["galore"])
    run(model, optimizer, 0, STEPS)
    stopped, before = start(METHODS["galore"])
    run(stopped, before, 0, STOP)
    state = through_disk(before.state_dict())
    for entry in state["attachment"]["slots"].values():
        entry["basis"] = torch.roll(entry["basis"], 1, dims=0)
    resumed, after = start(METHODS["galore"])
    resumed.load_state_dict(stopped.state_dict())
    after.load_state_dict(state)
    run(resumed, after, STOP, STEPS)
    with pytest.raises(AssertionError):
        assert_same(snapshot(resumed), snapshot(model))


def test_going_back_to_an_earlier_state() -> None:
    """A state loads into an optimizer that has moved on, whose own layers and bases then go."""
    model, optimizer = start(METHODS["owlore-keep"])
    run(model, optimizer, 0, 3)
    weights, state = copy.deepcopy(model.state_dict()), through_disk(optimizer.state_dict())
    run(model, optimizer, 3, 8)
    end, wanted = snapshot(model), optimizer.history
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert_same(optimizer.state_dict(), state)
    run(model, optimizer, 3, 8)
    assert_same(snapshot(model), end)
    assert optimizer.history == wanted


def other_method() -> dict[str, Any]:
    model, optimizer = start(METHODS["lisa"])
    run(model, optimizer, 0, 1)
    return optimizer.state_dict()


def other_rank() -> dict[str, Any]:
    model, optimizer = start(OwLore(active_layers=2, period=7, gap=3, rank=5, scores="weight-norm"))
    run(model, optimizer, 0, 1)
    return optimizer.state_dict()


def other_width() -> dict[str, Any]:
    model = llama(layers=3, hidden_size=64, intermediate_size=80)
    optimizer = attach(model, METHODS["owlore"])
    run(model, optimizer, 0, 1)
    return optimizer.state_dict()


def other_depth() -> dict[str, Any]:
    model = llama(layers=4, hidden_size=64, intermediate_size=96)
    optimizer = attach(model, METHODS["owlore"])
    run(model, optimizer, 0, 1)
    return optimizer.state_dict()


def other_blocks() -> dict[str, Any]:
    model = llama(layers=3, hidden_size=64, intermediate_size=96)
    optimizer = attach(model, METHODS["owlore"], block_size=128)
    run(model, optimizer, 0, 1)
    return optimizer.state_dict()


def no_attachment() -> dict[str, Any]:
    state = start(METHODS["owlore"])[1].state_dict()
    del state["attachment"]
    return state


@pytest.mark.parametrize("make", [other_method, other_rank, other_width, other_depth, other_blocks, no_attachment])
def test_another_methods_or_models_state_is_refused_and_nothing_changes(make: Any) -> None:
    """Weights, state, draws, flags and the run that follows are as if nothing had been loaded."""
    state = make()
    model, optimizer = start(METHODS["owlore"])
    twin, reference = start(METHODS["owlore"])
    run(model, optimizer, 0, 3)
    run(twin, reference, 0, 3)
    shape, before, weights = anatomy(model), copy.deepcopy(optimizer.state_dict()), snapshot(model)
    with pytest.raises(InputError):
        optimizer.load_state_dict(state)
    assert anatomy(model) == shape
    assert_same(optimizer.state_dict(), before)
    assert_same(snapshot(model), weights)
    run(model, optimizer, 3, STEPS)
    run(twin, reference, 3, STEPS)
    assert_same(snapshot(model), snapshot(twin))
