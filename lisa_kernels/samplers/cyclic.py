"""Layers in turn, each once per cycle (BAdam, arXiv 2404.02827)."""

from __future__ import annotations

from typing import Any

from lisa_kernels.errors import unknown_name
from lisa_kernels.samplers.base import Sampler, random_order

_ORDERS = ("random", "ascending", "descending")


class CyclicSampler(Sampler):
    """Draw consecutive blocks of an endless row of permutations, so that visits never differ by more than one.

    A cycle is one permutation; `order="random"` shuffles each anew. Where `active_layers` does not divide `layers`,
    a draw may span two permutations: the second is rearranged at its start so that no draw holds a layer twice, and
    every layer's long-run frequency is `active_layers / layers`. A layer is kept from being drawn twice in a row over
    a border whenever `layers >= 3 * active_layers` (`6 *` where `active_layers` does not divide `layers`). Above half
    of the layers, the blocks are those that rest.

    Each permutation depends on its own and the preceding random stream only: draw `k` needs no history.
    """

    def __init__(self, layers: int, active_layers: int = 1, seed: int = 0, order: str = "random") -> None:
        super().__init__(layers, active_layers, seed)
        if order not in _ORDERS:
            raise unknown_name("order", order, _ORDERS)
        self.order = order

    def draw(self, k: int) -> tuple[int, ...]:
        """Return the layers of period `k`."""
        if self.order == "random":
            if 2 * self.active_layers <= self.layers:
                return tuple(sorted(self._block(k, self.active_layers)))
            resting = set(self._block(k, self.layers - self.active_layers))
            return tuple(layer for layer in range(self.layers) if layer not in resting)
        first = k * self.active_layers
        places = [place % self.layers for place in range(first, first + self.active_layers)]
        if self.order == "descending":
            places = [self.layers - 1 - place for place in places]
        return tuple(sorted(places))

    def inclusion_probabilities(self) -> list[float]:
        """Return each layer's long-run share of the draws, `active_layers / layers`."""
        return [self.active_layers / self.layers] * self.layers

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().config(), "order": self.order}

    def _block(self, k: int, size: int) -> list[int]:
        """Return block `k` of `size` layers of the row of permutations; `size` is at most half of the layers."""
        cycle, offset = divmod(k * size, self.layers)
        row = self._permutation(cycle, size)
        if offset + size > self.layers:
            row = row + self._permutation(cycle + 1, size)
        return row[offset : offset + size]

    def _permutation(self, cycle: int, size: int) -> list[int]:
        """Return the permutation of a cycle, its start free of the layers that ended the cycle before.

        Moving the first allowed layers to the front leaves its own end as it was shuffled, because there are enough of
        them before that end; so the next cycle knows this end without knowing the rearrangement.
        """
        if self.layers == 2:
            cycle = 0  # the one order that never draws a layer twice in a row is the same in each cycle
        shuffled = self._shuffled(cycle)
        if cycle == 0:
            return shuffled
        tail, head = self._guarded(cycle - 1, size)
        recent = set(self._shuffled(cycle - 1)[self.layers - tail :])
        start = [layer for layer in shuffled if layer not in recent][:head]
        return start + [layer for layer in shuffled if layer not in start]

    def _guarded(self, cycle: int, size: int) -> tuple[int, int]:
        """Return how many layers at the end of a cycle may not be among how many first ones of the next."""
        wide = min(size if self.layers % size == 0 else 2 * size, self.layers // 3)
        if wide >= size:
            return wide, wide
        # Too few layers to keep neighbouring draws apart: only the draw that spans the border is kept distinct.
        tail = (cycle + 1) * self.layers % size
        return tail, (size - tail) % size

    def _shuffled(self, cycle: int) -> list[int]:
        return random_order(range(self.layers), self._stream(cycle))
