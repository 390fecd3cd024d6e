"""The draws of layers that a rehearsal takes in the place of a sampler's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from lisa_kernels.methods import Method
from lisa_kernels.methods.units import Layout, Unit
from lisa_kernels.samplers import Sampler

# Draws that a mean is taken of.
MEAN_DRAWS = 400


class GivenDraws(Sampler):
    """Draws the layers that it was given, one list after the other and the last one for ever.

    The first `visits` draws are those of periods gone by. before_switch is called before layers change.
    """

    def __init__(self, layers: int, draws: Sequence[Sequence[int]], visits: int = 0) -> None:
        super().__init__(layers, len(draws[0]), seed=0)
        self.draws = [tuple(sorted(draw)) for draw in draws]
        self.visits = visits
        self.before_switch: Callable[[], None] = lambda: None

    def draw(self, k: int) -> tuple[int, ...]:
        """Return the layers of period `k`."""
        draw = self.draws[min(k, len(self.draws) - 1)]
        if draw != self.draws[min(max(k - 1, 0), len(self.draws) - 1)]:
            self.before_switch()
        return draw

    def inclusion_probabilities(self) -> list[float]:
        """Return each layer's share of the draws given."""
        return [sum(layer in draw for draw in self.draws) / len(self.draws) for layer in range(self.layers)]


def draws_of(layout: Layout, active: int) -> list[list[int]]:
    """Return the draw that costs most, twice, and one of layers evenly apart.

    The first is of the largest units, of equal ones the highest: their backwards run while most of the graph is still
    there. Where nothing below the blocks trains always, the lowest layer is among them, so that the graph is as long as
    it can be.
    """
    drawn = layout.drawn
    lowest = [] if layout.below else [0]
    largest = sorted(range(len(drawn)), key=lambda index: (_trained_elements(drawn[index]), index), reverse=True)
    most = [*lowest, *(index for index in largest if index not in lowest)][:active]
    between = [round((place + 1) * (len(drawn) + 1) / (active + 1)) - 1 for place in range(active)]
    return [most, most, between]


def mean_draws(layout: Layout, method: Method) -> list[list[int]]:
    """Return a draw as deep as one is on average, twice, and another just as deep: what steps take in the long run.

    How far down a backward goes matters where nothing below the blocks trains always. Scores are taken to be equal.
    """
    layers, active = len(layout.drawn), method.get("active_layers", 1)
    lowest = 0
    if not layout.below:
        sampler = method.make_sampler(layers, 0, [1.0] * layers)
        assert sampler is not None
        lowest = round(statistics.mean(min(sampler.draw(k)) for k in range(MEAN_DRAWS)))
    lowest = min(lowest, layers - active)
    highest = layers - 1
    first = [lowest + round(place * (highest - lowest) / max(1, active - 1)) for place in range(active)]
    # The same lowest one, so that the switch is the only difference; of one layer its neighbour.
    free = [layer for layer in range(lowest + 1, layers) if layer not in first]
    second = [*first[:-1], free[-1]] if free and active > 1 else [min(highest, lowest + 1)] if active == 1 else first
    return [first, first, second]


def every_layer(layers: int, active: int) -> list[list[int]]:
    """Return draws in which every layer comes at least once."""
    starts = [min(start, layers - active) for start in range(0, layers, active)]
    return [list(range(start, start + active)) for start in starts]


def _trained_elements(unit: Unit) -> int:
    return sum(param.numel() for param in unit.full) + sum(
        layer.rank * layer.out_features for layer in unit.lowrank.values()
    )
