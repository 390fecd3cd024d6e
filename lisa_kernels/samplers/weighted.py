"""Layers sampled in proportion to a score (OwLore and OWS, arXiv 2405.18380)."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.samplers.base import Sampler, random_order
from lisa_kernels.samplers.designs import capped_inclusions, race_draw, race_inclusions, systematic_draw
from lisa_kernels.samplers.shallow import Layers, shallow_sets

_DESIGNS = ("marginals", "sequential", "shallow")
# Multiples of it, modulo 1, fill the interval evenly however many are taken.
_GOLDEN = (math.sqrt(5) - 1) / 2


class WeightedSampler(Sampler):
    """Draw layers by weight, one weight per layer.

    `design="marginals"` includes layer i with probability exactly `active_layers * p_i`, capped at 1 with the rest
    rescaled; `design="sequential"` draws one after another without replacement, as OwLore's public code does, which
    includes heavy layers less often than that. `design="shallow"` has the probabilities of "marginals" and draws
    neighbours together, which ends the backward pass of most draws far above the first layer; its sets come in turns as
    even as their probabilities allow.
    """

    def __init__(self, weights: Sequence[float], active_layers: int, seed: int = 0, design: str = "marginals") -> None:
        super().__init__(len(weights), active_layers, seed)
        if design not in _DESIGNS:
            raise unknown_name("design", design, _DESIGNS)
        self.weights = [float(weight) for weight in weights]
        self.design = design
        for layer, weight in enumerate(self.weights):
            if not math.isfinite(weight) or weight < 0:
                raise InputError(f"the weight of layer {layer} is {weight}: weights are finite and not negative.")
        positive = sum(weight > 0 for weight in self.weights)
        if positive < active_layers:
            raise InputError(
                f"only {positive} of {self.layers} weights are positive, but {active_layers} layers are to be drawn: "
                f"give more positive weights or fewer active_layers."
            )

    def draw(self, k: int) -> tuple[int, ...]:
        """Return the layers of period `k`."""
        stream = self._stream(k)
        if self.design == "sequential":
            return race_draw(self.weights, self.active_layers, stream)
        return self._in_turn(k) if self.design == "shallow" else systematic_draw(self._inclusions, stream)

    def inclusion_probabilities(self) -> list[float]:
        """Return each layer's true probability of being in a draw, of the design that is used."""
        return list(self._inclusions)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "weights": list(self.weights),
            "active_layers": self.active_layers,
            "seed": self.seed,
            "design": self.design,
        }

    @cached_property
    def _inclusions(self) -> list[float]:
        inclusions = race_inclusions if self.design == "sequential" else capped_inclusions
        return inclusions(self.weights, self.active_layers)

    @cached_property
    def sets(self) -> list[tuple[Layers, float]]:
        """The sets of a shallow design in an order of the seed's, and the probability of each."""
        return random_order(shallow_sets(self._inclusions), self._stream(0))

    def _in_turn(self, k: int) -> Layers:
        start = self._stream(1).random()
        ends = list(accumulate(share for _, share in self.sets))
        return self.sets[min(bisect(ends, (start + k * _GOLDEN) % 1.0), len(ends) - 1)][0]
