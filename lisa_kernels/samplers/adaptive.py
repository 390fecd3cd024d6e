"""Layers sampled by the gradient norms seen so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lisa_kernels.errors import InputError
from lisa_kernels.samplers.base import Sampler
from lisa_kernels.samplers.designs import capped_inclusions, systematic_draw


class AdaptiveSampler(Sampler):
    """Draw layers in proportion to a running average of their gradient norm, with some uniform exploration.

    `averages[i]` is an exponential average (weight `momentum` on the past) or None while layer i is unobserved: it
    then counts as the mean of the others. The share of layer i is `(1 - exploration) * its norm share + exploration /
    layers`, and inclusion is exactly `active_layers` times that, capped at 1 with the rest rescaled.
    """

    def __init__(
        self, layers: int, active_layers: int, seed: int = 0, momentum: float = 0.9, exploration: float = 0.2
    ) -> None:
        super().__init__(layers, active_layers, seed)
        if not 0.0 <= momentum < 1.0:
            raise InputError(f"momentum is {momentum}: give a number from 0 up to, not including, 1.")
        if not 0.0 < exploration <= 1.0:
            raise InputError(f"exploration is {exploration}: give a number above 0, so that each layer returns, to 1.")
        self.momentum = momentum
        self.exploration = exploration
        self.averages: list[float | None] = [None] * layers

    def observe(self, norms: Mapping[int, float]) -> None:
        """Average in the gradient norm of some layers; a norm that is not finite is ignored."""
        for layer, norm in norms.items():
            if not 0 <= layer < self.layers:
                raise InputError(f"a gradient norm was given for layer {layer}: layers are 0 to {self.layers - 1}.")
            if norm < 0:
                raise InputError(f"the gradient norm of layer {layer} is {norm}: a norm is not negative.")
            if not math.isfinite(norm):
                continue
            past = self.averages[layer]
            self.averages[layer] = float(norm if past is None else self.momentum * past + (1.0 - self.momentum) * norm)

    def draw(self, k: int) -> tuple[int, ...]:
        """Return the layers of period `k`, given what was observed until now."""
        return systematic_draw(self.inclusion_probabilities(), self._stream(k))

    def inclusion_probabilities(self) -> list[float]:
        """Return each layer's true probability of being in the next draw."""
        observed = [average for average in self.averages if average is not None]
        top = max(observed, default=0.0)
        if top == 0.0:
            return [self.active_layers / self.layers] * self.layers
        mean = math.fsum(average / top for average in observed) / len(observed)
        norms = [mean if average is None else average / top for average in self.averages]
        total = math.fsum(norms)
        shares = [(1.0 - self.exploration) * norm / total + self.exploration / self.layers for norm in norms]
        return capped_inclusions(shares, self.active_layers)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().config(), "momentum": self.momentum, "exploration": self.exploration}

    def state_dict(self) -> dict[str, Any]:
        """Return the configuration and the averages."""
        return {**super().state_dict(), "averages": list(self.averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the averages of an equally configured sampler."""
        super().load_state_dict(state)
        averages = state.get("averages")
        if not isinstance(averages, Sequence) or len(averages) != self.layers:
            raise InputError(f"the sampler state differs in 'averages': a list of {self.layers} is wanted.")
        self.averages = [None if average is None else float(average) for average in averages]
