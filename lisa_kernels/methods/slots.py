"""What the optimizer does with low-rank slots around its step: carry moments over, fold, save."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.basis import transport_moments
from lisa_kernels.errors import InputError
from lisa_kernels.layers import SlotModule
from lisa_kernels.ops.fold import fold_
from lisa_kernels.optim import AdamW8bit


def stagger(layers: Sequence[SlotModule]) -> None:
    """Spread the basis refreshes of the active layers evenly over their gap, so that no step pays for all."""
    tracked = [layer.tracker for layer in layers if layer.tracker is not None]
    for index, tracker in enumerate(tracked):
        tracker.offset = index * tracker.gap // len(tracked)


def _group_of(optimizer: AdamW8bit, layer: SlotModule) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(param is layer.slot for param in group["params"]))


def transport_slots(optimizer: AdamW8bit, layers: Sequence[SlotModule], skip: Mapping[torch.device, Tensor]) -> None:
    """Carry the moments of every slot whose basis was refreshed by the last backward into the new basis.

    A gradient that was of no use left the basis and a rotation of exactly one; then the state keeps its every bit. So
    it does where the step is skipped (bool 0-d for each device): the old basis then comes back.
    """
    turned: dict[Tensor, tuple[SlotModule, Tensor]] = {}
    for layer in layers:
        turn = None if layer.tracker is None else layer.tracker.take_turn()
        if turn is None:
            continue
        rotation, old = turn
        back = skip.get(old.device, torch.zeros((), dtype=torch.bool, device=old.device))
        layer.basis.copy_(torch.where(back, old.to(layer.basis.dtype), layer.basis))
        if layer.slot in optimizer.state:
            unit = torch.eye(layer.rank, dtype=rotation.dtype, device=rotation.device)
            turned[layer.slot] = layer, torch.where(back, unit, rotation)
    for slots in optimizer.windows(turned):
        with optimizer.at_hand(slots):
            for slot in slots:
                _transport(optimizer, *turned[slot])


def _transport(optimizer: AdamW8bit, layer: SlotModule, rotation: Tensor) -> None:
    betas = _group_of(optimizer, layer)["betas"]
    state = optimizer.state[layer.slot]
    before = {name: tensor.clone() for name, tensor in state.items()}
    m, v = optimizer.moments(layer.slot)
    gradient = layer.slot.grad
    if gradient is not None:
        gradient = gradient * optimizer._unscaling(gradient.device)
    optimizer.set_moments(layer.slot, *transport_moments(m, v, rotation, state["step"], betas, gradient))
    turned = (rotation != torch.eye(layer.rank, device=rotation.device)).any()
    for name, tensor in state.items():
        tensor.copy_(torch.where(turned, tensor, before[name]))


def fold_slots(optimizer: AdamW8bit, layers: Sequence[SlotModule]) -> None:
    """W ← (1 − lr·wd) W + scale · Bᵀ P and B ← 0, for slots that fold after each step.

    A skipped step left B at zero; its decay is then left out on the device, so that W stays as it was.
    """
    for layer in layers:
        if layer.tracker is None:
            continue
        clock, _ = optimizer._counters_on(layer.slot.device)
        group = _group_of(optimizer, layer)
        decay = torch.where(optimizer.last_skip(layer.slot.device), 1.0, 1.0 - group["lr"] * group["weight_decay"])
        fold_(
            layer.stored_weight.data, *layer.lifting_factors(), decay=decay, clock=clock,
            stochastic=optimizer.rounding == "stochastic", seed=optimizer.seed,
            parameter=optimizer.index_of(layer.slot), remainder=layer.remainder if layer.remainder.numel() else None,
        )  # fmt: skip
        layer.slot.data.zero_()


def kept_buffers(layer: SlotModule) -> dict[str, Tensor]:
    """Return basis and remainder by name, where the layer has them."""
    named = {"basis": layer.basis, "remainder": layer.remainder}
    return {name: tensor for name, tensor in named.items() if tensor.numel()}


def slots_state(
    layers: Mapping[str, SlotModule], paged: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """Return basis, remainder, tracker and (for adapters) slot and weight of every layer that has a basis.

    An adapter's weight is the one beneath it, not a copy: a model's own state holds the two as one, from which neither
    could be found again.

    paged: bases and remainders of resting layers that are kept elsewhere, by path.
    """
    state: dict[str, dict[str, Any]] = {}
    for path, layer in layers.items():
        entry: dict[str, Any] = dict(paged.get(path) or kept_buffers(layer))
        if "basis" in entry:
            if layer.tracker is None:
                entry["slot"], entry["weight"] = layer.slot.detach(), layer.stored_weight.detach()
            else:
                entry["tracker"] = layer.tracker.state_dict()
            state[path] = entry
    return state


def check_slots_state(layers: Mapping[str, SlotModule], state: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError unless `state` is what `slots_state` returns for layers of these shapes."""
    for path, entry in state.items():
        if path not in layers:
            raise InputError(f"the state holds a basis for {path}, which this model does not have.")
        layer = layers[path]
        wanted: dict[str, tuple[int, ...]] = {"basis": (layer.rank, layer.in_features)}
        if layer.tracker is None:
            wanted["slot"], wanted["weight"] = (layer.rank, layer.out_features), tuple(layer.stored_weight.shape)
        if "remainder" in entry:
            wanted["remainder"] = tuple(layer.stored_weight.shape)
        for name, shape in wanted.items():
            given = tuple(entry[name].shape) if name in entry else ()
            if given != shape:
                raise InputError(f"the saved {name} of {path} is {list(given)}; this model needs {list(shape)}.")


def take_slots_state(layers: Mapping[str, SlotModule], state: Mapping[str, Mapping[str, Any]]) -> None:
    """Take over what `slots_state` returned; active layers already own their storage, bases not in it are freed."""
    for path, layer in layers.items():
        entry = state.get(path)
        if entry is None:
            if not layer.active:
                layer.deactivate()
            continue
        layer.basis = entry["basis"].to(layer.stored_weight.device, layer.stored_weight.dtype, copy=True)
        if layer.tracker is None:
            layer.slot.data.copy_(entry["slot"])
            layer.stored_weight.data.copy_(entry["weight"])
            layer.restarted = False
        else:
            layer.tracker.load_state_dict(entry["tracker"])
        if "remainder" in entry and layer.exact_master and layer.stored_weight.dtype == torch.bfloat16:
            layer.remainder = entry["remainder"].to(layer.stored_weight.device, copy=True)


@contextmanager
def slots_in_shape(layers: Iterable[SlotModule]) -> Iterator[None]:
    """Give inactive slots their shape, without storage, so that kept moments can be checked against it."""
    resting = [layer for layer in layers if not layer.active]
    try:
        for layer in resting:
            shape = (layer.rank, layer.out_features)
            layer.slot.data = torch.zeros((), device=layer.stored_weight.device).expand(shape)
        yield
    finally:
        for layer in resting:
            layer.slot.data = torch.empty(0, device=layer.slot.device)
