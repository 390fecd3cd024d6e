"""What layers own while they rest, and that nothing grows over many switches."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import psutil
import pytest
import torch
from families import llama, tokens, train
from torch import nn

from lisa_kernels import LISA, OWS, BAdam, GaLore, OwLore, attach
from lisa_kernels.layers import LowRankLinear
from lisa_kernels.methods import Method, SampledAdamW

SWITCHING: dict[str, Method] = {
    "lisa": LISA(active_layers=1, period=1),
    "lisa-sampled": LISA(active_layers=1, period=1, embeddings="sampled"),
    "lisa-low-rank": LISA(active_layers=1, period=1, rank=4, embeddings="low-rank"),
    "owlore": OwLore(active_layers=2, period=1, rank=4, scores="uniform"),
    "ows": OWS(active_layers=2, period=1, scores="gradient-norm"),
    "badam": BAdam(period=1),
    "owlore-keep": OwLore(active_layers=2, period=1, rank=4, scores="uniform", retired_state="keep"),
}


# Beside weights at rest.
RESTING: dict[str, dict[str, str]] = {
    "lisa-resting": {"resting": "nf4"},
    "owlore-resting": {"resting": "nf4"},
    "owlore-on-masters": {"resting": "nf4", "active_on": "master"},
}
SWITCHING |= {
    "lisa-resting": LISA(active_layers=1, period=1, rank=4, embeddings="low-rank"),
    "owlore-resting": OwLore(active_layers=2, period=1, rank=4, scores="uniform"),
    "owlore-on-masters": OwLore(active_layers=2, period=1, rank=4, scores="uniform", embeddings="frozen"),
}


def quick(model: nn.Module, optimizer: SampledAdamW, seed: int = 0) -> None:
    train(model, optimizer, tokens(1, 4, seed))


def owned(optimizer: SampledAdamW) -> dict[str, int]:
    """Return what the attachment holds now: tensors and bytes of state, slots and bases; and the model's bytes."""
    state = [tensor for values in optimizer.state.values() for tensor in values.values()]
    layers = [module for module in optimizer.model.modules() if isinstance(module, LowRankLinear)]
    slots = [tensor for layer in layers for tensor in (layer.slot, layer.basis)]
    model = [*optimizer.model.parameters(), *optimizer.model.buffers()]
    return {
        "states": len(state),
        "state bytes": sum(tensor.untyped_storage().nbytes() for tensor in state),
        "slot bytes": sum(tensor.untyped_storage().nbytes() for tensor in slots),
        "model bytes": sum(tensor.untyped_storage().nbytes() for tensor in model),
        "gradients": sum(param.grad is not None for param in model if isinstance(param, nn.Parameter)),
    }


def live_tensors(optimizer: SampledAdamW) -> int:
    """Return how many tensors there are, frozen ones and the optimizer's state aside, which differs between layers."""
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()) - owned(optimizer)["states"]


@pytest.mark.parametrize("name", SWITCHING)
def test_inactive_layers_own_nothing(name: str) -> None:
    """Right after a switch slots and bases of resting layers have no storage; their state is gone, unless kept."""
    model = llama(layers=4)
    optimizer = attach(model, SWITCHING[name])
    keep = "keep" in name
    for step in range(6):
        quick(model, optimizer, step)
        for index, unit in enumerate(optimizer.layout.drawn):
            if index in optimizer.active_layers:
                continue
            assert not any(param.requires_grad or param.grad is not None for param in unit.params())
            assert keep or not any(param in optimizer.state for param in unit.params())
            for layer in unit.lowrank.values():
                assert layer.slot.untyped_storage().nbytes() == 0
                assert keep or layer.basis.untyped_storage().nbytes() == 0


@pytest.fixture
def few_objects() -> Iterator[None]:
    """Leave what was there before out of the objects to look through: thousands of them are tests and imports."""
    llama(layers=1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def run_switches(name: str, switches: int) -> None:
    """Assert that no byte or tensor is owned after many switches that was not after the first thirty."""
    model = llama(layers=4)
    optimizer = attach(model, SWITCHING[name], **RESTING.get(name, {}))
    # What is owned right after a switch depends on how many layers stayed: the most of the warm-up is the bound.
    warm_up = []
    for step in range(30):
        quick(model, optimizer, step % 3)
        warm_up.append({**owned(optimizer), "tensors": live_tensors(optimizer)})
    most = {key: max(row[key] for row in warm_up) for key in warm_up[0]}
    memory = psutil.Process().memory_info().rss
    for step in range(switches):
        quick(model, optimizer, step % 3)
        assert all(value <= most[key] for key, value in owned(optimizer).items())
    assert len(optimizer.history) == switches + 31
    assert live_tensors(optimizer) <= most["tensors"]
    assert psutil.Process().memory_info().rss - memory < 16e6


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("name", SWITCHING)
def test_a_few_switches_leave_bytes_as_they_were(name: str) -> None:
    """Thirty switches: state, slots, model bytes and the number of live tensors are flat."""
    run_switches(name, 30)


@pytest.mark.usefixtures("few_objects")
def test_refreshes_leave_no_tensor_behind() -> None:
    """What is held once every basis was found is held after each was refreshed, too, down to single numbers."""
    optimizer = attach(llama(layers=2), GaLore(rank=4, gap=6, embeddings="low-rank"))
    counts = []
    for step in range(14):
        quick(optimizer.model, optimizer, step % 3)
        counts.append(live_tensors(optimizer))
    assert set(counts[6:]) <= set(counts[1:6])


@pytest.mark.slow
@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("name", ["lisa", "owlore", "badam", *RESTING])
def test_a_thousand_switches_leave_bytes_as_they_were(name: str) -> None:
    """No creep over 1,000 switches, in tensors, bytes or the process's memory."""
    run_switches(name, 1000)


def test_kept_state_comes_back_bit_equal() -> None:
    """With retired_state="keep" a layer's moments and bases wait for its return as they were."""
    model = llama(layers=3)
    optimizer = attach(model, BAdam(period=2, retired_state="keep", order="ascending"))
    unit = optimizer.layout.drawn[0]
    for _ in range(2):
        quick(model, optimizer)
    kept = {param: {name: value.clone() for name, value in optimizer.state[param].items()} for param in unit.params()}
    for _ in range(4):
        quick(model, optimizer)
    assert optimizer.active_layers == [0]
    for param, values in kept.items():
        assert all(torch.equal(optimizer.state[param][name], value) for name, value in values.items())


def test_kept_bases_come_back_bit_equal() -> None:
    """The bases too: they and the slots' moments are as they were when the layer left, and go on from there."""
    model = llama(layers=3)
    method = OwLore(active_layers=1, period=2, rank=4, scores="uniform", retired_state="keep")
    optimizer = attach(model, method)
    first = optimizer.active_layers[0]
    layers = optimizer.layout.drawn[first].lowrank

    def held() -> dict[str, dict[str, torch.Tensor]]:
        return {
            path: {"basis": layer.basis.clone(), **{k: v.clone() for k, v in optimizer.state[layer.slot].items()}}
            for path, layer in layers.items()
        }

    def step_while(active: bool) -> None:
        for _ in range(40):
            if (first in optimizer.active_layers) != active:
                return
            quick(model, optimizer)
        raise AssertionError("the draw never changed")

    step_while(active=True)
    kept = held()
    step_while(active=False)
    for path, values in held().items():
        assert layers[path].active
        assert all(torch.equal(value, kept[path][name]) for name, value in values.items())
    quick(model, optimizer)
    for path, layer in layers.items():
        assert optimizer.state[layer.slot]["step"] == kept[path]["step"] + 1
