"""The parameter groups of an attached model's optimizer: what trains with which rate and decay."""

from __future__ import annotations

import math
from typing import Any

from lisa_kernels.methods.definitions import Method
from lisa_kernels.methods.units import Layout

# Of the rate of adapters, whose factors are small at first, for slots that are folded into the weights beside them.
FOLDED_SHARE = 0.25


def parameter_groups(method: Method, layout: Layout, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return every parameter that may ever train, by group.

    A factor on a group's rate is for the update only: the decay of a weight stays lr · weight_decay.
    """
    full = [param for unit in layout.units() for param in unit.full]
    layers = [layer for unit in layout.units() for layer in unit.lowrank.values()]
    beside = [layer for layer in layers if method.form == "adapter" and layer.tracker is not None]
    adapters = [layer for layer in layers if layer not in beside]
    # Of adapters that train both factors the mean rate is lr.
    apart = math.sqrt(method.get("rate_ratio", 1.0))
    shares = {
        "slots": ([layer.slot for layer in adapters], method.get("scale", 1.0) * apart),
        "bases": ([param for layer in adapters for param in layer.trained if param is not layer.slot], 1 / apart),
        "folded": ([param for layer in beside for param in layer.trained], FOLDED_SHARE),
    }
    groups: list[dict[str, Any]] = [
        {"params": [param for param in full if param.dim() >= 2], "name": "matrices"},
        *(
            {"params": params, "lr": lr * share, "weight_decay": weight_decay / share, "name": name}
            for name, (params, share) in shares.items()
        ),
        {"params": [param for param in full if param.dim() < 2], "weight_decay": 0.0, "name": "vectors"},
    ]
    return [group for group in groups if group["params"]]
