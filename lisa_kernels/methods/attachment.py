"""What the optimizer of an attached model saves beside its parameters' states, and what it takes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lisa_kernels.errors import InputError
from lisa_kernels.layers import RestingLinear
from lisa_kernels.methods.active_on import CODES, MASTER
from lisa_kernels.methods.precision import AS_THEY_ARE, is_picked
from lisa_kernels.methods.slots import check_slots_state, slots_state
from lisa_kernels.samplers import Sampler, sampler_from_state

if TYPE_CHECKING:
    from lisa_kernels.methods.sampled_adamw import SampledAdamW


def attachment_state(optimizer: SampledAdamW) -> dict[str, Any]:
    """Return method, seed, sampler and its counts, active layers, and the bases and adapters of all layers."""
    return {
        "method": optimizer.method.settings(),
        "seed": optimizer.seed,
        "sampler": None if optimizer.sampler is None else optimizer.sampler.state_dict(),
        "calls": optimizer.calls,
        "active_layers": optimizer.active_layers,
        "visits": list(optimizer.visits),
        "history": [list(row) for row in optimizer.history],
        "norms": {str(index): seen for index, seen in optimizer._norms.items()},
        "slots": slots_state(optimizer._layers(), optimizer._shelf.held()),
        "resting": optimizer.layout.resting,
        "on_masters": optimizer.layout.on_masters,
        "precisions": _precisions(optimizer),
    }


def check_attachment(optimizer: SampledAdamW, saved: Mapping[str, Any]) -> Sampler | None:
    """Return the sampler of a state; InputError unless it is of this method and of such a model. Changes nothing."""
    if saved["method"] != optimizer.method.settings():
        raise InputError(f"the state was saved with {saved['method']}; this run has {optimizer.method.settings()}.")
    if saved.get("resting") != optimizer.layout.resting:
        was, now = (way or AS_THEY_ARE for way in (saved.get("resting"), optimizer.layout.resting))
        raise InputError(f"the state was saved with resting={was!r}; this run has {now!r}.")
    if any(not layer.codes_home.stays for layer, _ in _rested_otherwise(optimizer, saved)):
        raise InputError(
            f"the state is of a model in which resting={saved.get('resting')!r} was found to mean other matrices in 8 "
            "bits, and codes that are streamed stay as they are; attach with resting_where='device'."
        )
    layout = optimizer.layout
    if saved.get("on_masters", False) != layout.on_masters:
        was, now = (MASTER if way else CODES for way in (saved.get("on_masters", False), layout.on_masters))
        raise InputError(f"the state was saved with active_on={was!r}; this run has {now!r}.")
    sampler = None if saved["sampler"] is None else sampler_from_state(saved["sampler"])
    if len(saved["visits"]) != len(layout.drawn):
        raise InputError(f"the state is of {len(saved['visits'])} layers; this model has {len(layout.drawn)}.")
    if sampler is not None and sampler.layers != len(layout.drawable):
        raise InputError(
            f"the state draws from {sampler.layers} layers; of this model's {len(layout.drawable)} can be drawn."
        )
    check_slots_state(optimizer._layers(), saved["slots"])
    return sampler


@torch.no_grad()
def take_precisions(optimizer: SampledAdamW, saved: Mapping[str, Any]) -> None:
    """Have each matrix rest in the bits that it had when a state was saved, whatever would be found now."""
    for layer, kind in _rested_otherwise(optimizer, saved):
        layer.rest_in(kind)


def _rested_otherwise(optimizer: SampledAdamW, saved: Mapping[str, Any]) -> list[tuple[RestingLinear, str]]:
    """Return the layers that rested in other bits when a state was saved, and these."""
    now, was = _precisions(optimizer) or {}, saved.get("precisions") or {}
    layers = dict(optimizer.model.named_modules())
    return [(layers[path], was[path]) for path, kind in now.items() if was.get(path, kind) != kind]  # type: ignore[misc]


def _precisions(optimizer: SampledAdamW) -> dict[str, str] | None:
    """Return in what each matrix rests where that may have been found out; None else."""
    if not is_picked(optimizer.layout.resting):
        return None
    return {path: layer.kind for path, layer in optimizer.model.named_modules() if isinstance(layer, RestingLinear)}
