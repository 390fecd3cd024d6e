"""Which layers train next: seeded, serialisable samplers that know no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.samplers.adaptive import AdaptiveSampler
from lisa_kernels.samplers.base import Sampler
from lisa_kernels.samplers.cyclic import CyclicSampler
from lisa_kernels.samplers.uniform import UniformSampler
from lisa_kernels.samplers.weighted import WeightedSampler

__all__ = [
    "AdaptiveSampler",
    "CyclicSampler",
    "Sampler",
    "UniformSampler",
    "WeightedSampler",
    "sampler_from_state",
]

_SAMPLERS: dict[str, type[Sampler]] = {
    sampler.__name__: sampler for sampler in (AdaptiveSampler, CyclicSampler, UniformSampler, WeightedSampler)
}


def sampler_from_state(state: Mapping[str, Any]) -> Sampler:
    """Rebuild the sampler that `Sampler.state_dict` described, whose later draws are the same."""
    name, config = state.get("class"), state.get("config")
    if not isinstance(name, str) or not isinstance(config, Mapping):
        raise InputError("the sampler state lacks 'class' or 'config': give what Sampler.state_dict() returned.")
    if name not in _SAMPLERS:
        raise unknown_name("sampler", name, _SAMPLERS)
    try:
        sampler = _SAMPLERS[name](**config)
    except TypeError as error:
        raise InputError(
            f"the sampler state has an unusable 'config' for {name} ({error}): give what Sampler.state_dict() returned."
        ) from error
    sampler.load_state_dict(state)
    return sampler
