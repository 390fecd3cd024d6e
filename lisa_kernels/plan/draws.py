"""The draws of layers that a rehearsal takes in the place of a sampler's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lisa_kernels.methods.units import Layout, Unit
from lisa_kernels.samplers import Sampler


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
    there. Where nothing below the blocks trains, the lowest layer is among them, so that the graph is as long as it
    can be.
    """
    drawn = layout.drawn
    lowest = [] if layout.always.params() else [0]
    largest = sorted(range(len(drawn)), key=lambda index: (_trained_elements(drawn[index]), index), reverse=True)
    most = [*lowest, *(index for index in largest if index not in lowest)][:active]
    between = [round((place + 1) * (len(drawn) + 1) / (active + 1)) - 1 for place in range(active)]
    return [most, most, between]


def every_layer(layers: int, active: int) -> list[list[int]]:
    """Return draws in which every layer comes at least once."""
    starts = [min(start, layers - active) for start in range(0, layers, active)]
    return [list(range(start, start + active)) for start in starts]


def _trained_elements(unit: Unit) -> int:
    return sum(param.numel() for param in unit.full) + sum(
        layer.rank * layer.out_features for layer in unit.lowrank.values()
    )
