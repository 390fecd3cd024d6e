"""What every layer sampler keeps: seeded draws, true inclusion probabilities, a state that survives JSON."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lisa_kernels.errors import InputError

_Item = TypeVar("_Item")


class Sampler(ABC):
    """Choose which layers train in each period.

    Draw `k` is a function of the constructor's arguments, of `k` and, for an adaptive sampler, of what it observed:
    no draw changes a later one, so ranks and resumed runs agree.
    """

    layers: int
    active_layers: int
    seed: int

    def __init__(self, layers: int, active_layers: int, seed: int) -> None:
        if layers < 1:
            raise InputError(f"a sampler was given {layers} layers: it needs at least one.")
        if not 1 <= active_layers <= layers:
            raise InputError(
                f"active_layers is {active_layers}, but there are {layers} layers: give a number from 1 to {layers}."
            )
        self.layers = layers
        self.active_layers = active_layers
        self.seed = seed

    @abstractmethod
    def draw(self, k: int) -> tuple[int, ...]:
        """Return the layers of period `k` (from 0): `active_layers` distinct indices, ascending."""

    @abstractmethod
    def inclusion_probabilities(self) -> list[float]:
        """Return each layer's true probability of being in a draw; they sum to `active_layers`."""

    def observe(self, norms: Mapping[int, float]) -> None:  # noqa: B027  (only adaptive samplers listen)
        """Take note of the gradient norm of some layers; samplers that do not adapt ignore it."""

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments, as JSON can hold them."""
        return {"layers": self.layers, "active_layers": self.active_layers, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """Return a JSON-able state from which `sampler_from_state` rebuilds this sampler."""
        return {"class": type(self).__name__, "config": self.config()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of an equally configured sampler.

        Raises `InputError` naming the first field that differs.
        """
        if state.get("class") != type(self).__name__:
            raise InputError(
                f"the sampler state differs in 'class': it is of {state.get('class')}, this sampler is a "
                f"{type(self).__name__}; load it into a sampler of its own class."
            )
        saved = state.get("config")
        if not isinstance(saved, Mapping):
            raise InputError("the sampler state has no 'config': it was not written by state_dict().")
        own = self.config()
        for field in [*own, *(name for name in saved if name not in own)]:
            if field not in saved or field not in own or saved[field] != own[field]:
                raise InputError(
                    f"the sampler state differs in {field!r}: it has {saved.get(field)!r}, this sampler has "
                    f"{own.get(field)!r}; continue with the configuration that the state was saved with."
                )

    def _stream(self, k: int) -> random.Random:
        """Return the random stream number `k` (from 0) of this sampler's seed."""
        if k < 0:
            raise InputError(f"draw {k} was asked for: draws are counted from 0.")
        return random.Random(f"{type(self).__name__}:{self.seed}:{k}")


def random_order(items: Sequence[_Item], stream: random.Random) -> list[_Item]:
    """Return the items in random order.

    Only `Random.random()` is used, the one method whose sequence Python promises to keep over its versions.
    """
    keys = [stream.random() for _ in items]
    return [items[place] for _, place in sorted(zip(keys, range(len(keys))))]
