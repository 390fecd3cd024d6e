"""The parameter groups of an attached model's optimizer: what trains with which rate and decay."""

from __future__ import annotations

from typing import Any

from lisa_kernels.methods.definitions import Method
from lisa_kernels.methods.units import Layout

# Of the rate of adapters, whose factors are small at first, for slots that are folded into the weights beside them.
FOLDED_SHARE = 0.25


def parameter_groups(method: Method, layout: Layout, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return every parameter that may ever train, by group: matrices, slots, slots folded beside adapters, vectors."""
    full = [param for unit in layout.units() for param in unit.full]
    layers = [layer for unit in layout.units() for layer in unit.lowrank.values()]
    beside = [layer for layer in layers if method.form == "adapter" and layer.tracker is not None]
    slots = [param for layer in layers if layer not in beside for param in layer.trained]
    folded = [param for layer in beside for param in layer.trained]
    scale = method.get("scale", 1.0)
    groups: list[dict[str, Any]] = [
        {"params": [param for param in full if param.dim() >= 2], "name": "matrices"},
        # scale is for the update only: the decay of the weight stays lr · weight_decay.
        {"params": slots, "lr": lr * scale, "weight_decay": weight_decay / scale, "name": "slots"},
        {"params": folded, "lr": lr * FOLDED_SHARE, "weight_decay": weight_decay / FOLDED_SHARE, "name": "folded"},
        {"params": [param for param in full if param.dim() < 2], "weight_decay": 0.0, "name": "vectors"},
    ]
    return [group for group in groups if group["params"]]
