"""What the optimizer does with low-rank slots around its step: carry moments over, fold, save."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lisa_kernels.basis import transport_many
from lisa_kernels.distributed.shards import local, rows_like, shard_like
from lisa_kernels.errors import InputError
from lisa_kernels.layers import AccumulatingSlot, SlotModule, accumulates
from lisa_kernels.optim import AdamW8bit
from lisa_kernels.optim.moments import read_moments, write_moments

# Elements of moments that are carried into new bases at a time: many small matrices take few launches then, and large
# ones, one after the other, the memory of one.
TURNED_ELEMENTS = 1 << 20


def stagger(layers: Sequence[SlotModule]) -> None:
    """Spread the basis refreshes of the active layers evenly over their gap, so that no step pays for all."""
    tracked = [layer.tracker for layer in layers if layer.tracker is not None]
    for index, tracker in enumerate(tracked):
        tracker.offset = index * tracker.gap // len(tracked)


def group_of(optimizer: AdamW8bit) -> dict[Tensor, dict[str, Any]]:
    """Return the group of each parameter."""
    return {param: group for group in optimizer.param_groups for param in group["params"]}


class Decays:
    """What the step just taken leaves of weights, 1 − lr·wd, and 1 where it was skipped: once for a group's many."""

    def __init__(self, optimizer: AdamW8bit) -> None:
        self._optimizer = optimizer
        self._made: dict[tuple[int, torch.device], Tensor] = {}

    def of(self, group: dict[str, Any], device: torch.device) -> Tensor:
        """Return float32 0-d for the weights of a group on a device."""
        key = id(group), device
        if key not in self._made:
            kept = torch.where(self._optimizer.last_skip(device), 1.0, 1.0 - group["lr"] * group["weight_decay"])
            self._made[key] = kept.to(torch.float32)
        return self._made[key]


class _Turn(NamedTuple):
    """A slot whose basis was refreshed, float32: P_new P_oldᵀ [r, r] and P_old [r, n]."""

    layer: SlotModule
    rotation: Tensor
    old: Tensor


def transport_slots(optimizer: AdamW8bit, layers: Sequence[SlotModule], skip: Mapping[torch.device, Tensor]) -> None:
    """Carry the moments of every slot whose basis was refreshed by the last backward into the new basis.

    A gradient that was of no use left the basis and a rotation of exactly one; then the state keeps its every bit. So
    it does where the step is skipped (bool 0-d for each device): the old basis then comes back.
    """
    turns: dict[Tensor, _Turn] = {}
    for layer in layers:
        turn = None if layer.tracker is None else layer.tracker.take_turn()
        if turn is None:
            continue
        rotation, old = turn
        if old.device in skip:
            torch.where(skip[old.device], old.to(layer.basis.dtype), layer.basis, out=layer.basis)
        if layer.slot in optimizer.state:
            turns[layer.slot] = _Turn(layer, rotation, old)
    groups = group_of(optimizer) if turns else {}
    for slots in optimizer.windows(turns):
        with optimizer.at_hand(slots):
            for some, betas in _alike([turns[slot] for slot in slots], groups):
                _transport(optimizer, some, betas, skip)


def _alike(
    turns: Sequence[_Turn], groups: Mapping[Tensor, dict[str, Any]]
) -> Iterator[tuple[list[_Turn], tuple[float, float]]]:  # fmt: skip
    """Yield turns of one device, rank and pair of betas, whose moments have up to `TURNED_ELEMENTS` together."""
    portions: dict[Any, list[_Turn]] = {}
    sizes: dict[Any, int] = {}
    for turn in turns:
        # A pair that was saved as JSON is a list.
        slot, betas = turn.layer.slot, tuple(groups[turn.layer.slot]["betas"])
        key = slot.device, turn.layer.rank, betas
        if key in portions and sizes[key] + slot.numel() > TURNED_ELEMENTS:
            yield portions.pop(key), betas
        sizes[key] = slot.numel() + (sizes[key] if key in portions else 0)
        portions.setdefault(key, []).append(turn)
    yield from ((some, key[-1]) for key, some in portions.items())


def _transport(
    optimizer: AdamW8bit, turns: Sequence[_Turn], betas: tuple[float, float], skip: Mapping[torch.device, Tensor]
) -> None:  # fmt: skip
    slots = [turn.layer.slot for turn in turns]
    device, states = slots[0].device, [optimizer.state[slot] for slot in slots]
    moments = [read_moments(state, slot.shape, optimizer.block_size) for state, slot in zip(states, slots)]
    rotations = torch.stack([turn.rotation for turn in turns])
    unit = torch.eye(rotations.shape[1], dtype=rotations.dtype, device=device)
    if device in skip:
        rotations = torch.where(skip[device], unit, rotations)
    gradients = [None if slot.grad is None else optimizer.unscaled(slot.grad) for slot in slots]
    steps = torch.stack([state["step"] for state in states])
    new = transport_many(moments, rotations, steps, betas, gradients)
    turned = (rotations != unit).flatten(1).any(1)
    keys = optimizer.rewriting_keys(slots)
    for state, moved, key, chosen in zip(states, new, keys, turned.unbind()):
        write_moments(state, *moved, optimizer.block_size, key, chosen)


def fold_slots(optimizer: AdamW8bit, layers: Sequence[SlotModule]) -> None:
    """W ← (1 − lr·wd) W + scale · Bᵀ P and B ← 0, for slots that fold after each step; others note the decay.

    A skipped step left B at zero; its decay is then left out on the device, so that W stays as it was.
    """
    tracked = [layer for layer in layers if layer.tracker is not None]
    groups, decays = group_of(optimizer), Decays(optimizer)
    folded = [layer for layer in tracked if not accumulates(layer)]
    for layer in tracked:
        if accumulates(layer):
            layer.note_step(decays.of(groups[layer.slot], layer.device))
    for layer in folded:
        layer.fold_into(
            layer.stored_weight.data, decays.of(groups[layer.slot], layer.slot.device),
            optimizer.step_key(layer.slot), layer.remainder if layer.remainder.numel() else None,
        )  # fmt: skip
    if folded:
        torch._foreach_zero_([layer.slot.data for layer in folded])


def settle_slots(optimizer: AdamW8bit, layers: Iterable[SlotModule], last: bool = False) -> None:
    """Put the slots of resting layers into their masters, which rest anew; `last`: rounded to nearest.

    Those of adapters are for `Adapters` to merge, and one that was settled since the last step has nothing to give.
    """
    settled: list[AccumulatingSlot] = []
    for layer in layers:
        if not accumulates(layer) or not layer.active or layer.tracker is None:
            continue
        if last or layer.stepped:
            layer.settle(None if last else optimizer.step_key(layer.slot))
            settled.append(layer)
    for copies in dict.fromkeys(layer.copies for layer in settled):
        if copies is not None:
            copies.finish()


def kept_buffers(layer: SlotModule) -> dict[str, Tensor]:
    """Return basis and remainder by name, where the layer has them."""
    named = {"basis": layer.basis.detach(), "remainder": layer.remainder}
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
        if "remainder" in entry:
            weight = layer.stored_weight
            entry["remainder"] = shard_like(weight, entry["remainder"], weight.shape)
        if "basis" in entry:
            if layer.is_adapter:
                entry["slot"], entry["weight"] = layer.slot.detach(), layer.stored_weight.detach()
            if accumulates(layer) and layer.active:
                entry["kept"] = layer.kept
            if layer.tracker is not None:
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
        if layer.tracker is None or "slot" in entry:
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
        layer.hold_basis(entry["basis"])
        if layer.is_adapter:
            layer.slot.data.copy_(entry["slot"])
            if accumulates(layer):
                layer.take_master(entry["weight"])
                layer.kept.copy_(entry["kept"])
                layer.stepped = True
            else:
                local(layer.stored_weight).copy_(rows_like(layer.stored_weight, entry["weight"]))
            layer.restarted = False
        if layer.tracker is not None:
            layer.tracker.load_state_dict(entry["tracker"])
        if "remainder" in entry and layer.exact_master and layer.stored_weight.dtype == torch.bfloat16:
            rows = rows_like(layer.stored_weight, entry["remainder"])
            layer.remainder = rows.to(layer.device, copy=True)


@contextmanager
def slots_in_shape(layers: Iterable[SlotModule]) -> Iterator[None]:
    """Give inactive slots their shape, without storage, so that kept moments can be checked against it."""
    resting = [layer for layer in layers if not layer.active]
    try:
        for layer in resting:
            shape = (layer.rank, layer.out_features)
            layer.slot.data = torch.zeros((), device=layer.device).expand(shape)
        yield
    finally:
        for layer in resting:
            layer.slot.data = torch.empty(0, device=layer.slot.device)
