"""Uniform sampling of layers (LISA, arXiv 2403.17919)."""

from __future__ import annotations

from lisa_kernels.samplers.base import Sampler, random_order


class UniformSampler(Sampler):
    """Draw `active_layers` layers, all subsets being equally likely."""

    def __init__(self, layers: int, active_layers: int, seed: int = 0) -> None:
        super().__init__(layers, active_layers, seed)

    def draw(self, k: int) -> tuple[int, ...]:
        """Return the layers of period `k`."""
        order = random_order(range(self.layers), self._stream(k))
        return tuple(sorted(order[: self.active_layers]))

    def inclusion_probabilities(self) -> list[float]:
        """Return `active_layers / layers` for each layer."""
        return [self.active_layers / self.layers] * self.layers
