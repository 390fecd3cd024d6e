"""What the optimizer of an attached model saves beside its parameters' states, and what it takes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lisa_kernels.errors import InputError
from lisa_kernels.methods.active_on import CODES, MASTER
from lisa_kernels.methods.resting import AS_THEY_ARE
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
    }


def check_attachment(optimizer: SampledAdamW, saved: Mapping[str, Any]) -> Sampler | None:
    """Return the sampler of a state; InputError unless it is of this method and of such a model. Changes nothing."""
    if saved["method"] != optimizer.method.settings():
        raise InputError(f"the state was saved with {saved['method']}; this run has {optimizer.method.settings()}.")
    if saved.get("resting") != optimizer.layout.resting:
        was, now = (way or AS_THEY_ARE for way in (saved.get("resting"), optimizer.layout.resting))
        raise InputError(f"the state was saved with resting={was!r}; this run has {now!r}.")
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
