"""Sets of layers that lie close together, drawn so that each layer is in one as often as it should be.

A backward pass reaches down to the lowest layer that trains. With the probability of each layer given, the sets may
still be chosen: neighbours together, so that most draws end high up.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

Layers = tuple[int, ...]


def shallow_sets(inclusions: Sequence[float]) -> list[tuple[Layers, float]]:
    """Return sets of layers, ascending, and the probability of each, by which layer i is in a set `inclusions[i]` of
    the time.

    inclusions: from 0 to 1, their sum a whole number, the size of each set. There are no more sets than layers, and
    one: the layers that must be in all that is left are in the next set, then the highest that have probability left;
    it gets as much as leaves every layer between nothing and all of the rest.
    """
    left, rest = _exact(inclusions), Fraction(1)
    size = int(sum(left))
    found: list[tuple[Layers, float]] = []
    while rest > 0:
        needed = [i for i, share in enumerate(left) if share == rest > 0]
        others = [i for i, share in enumerate(left) if 0 < share < rest]
        chosen = {*needed, *others[len(others) - (size - len(needed)) :]} if len(needed) < size else set(needed)
        share = min([left[i] for i in chosen] + [rest - left[i] for i in range(len(left)) if i not in chosen])
        found.append((tuple(sorted(chosen)), float(share)))
        left = [each - share if i in chosen else each for i, each in enumerate(left)]
        rest -= share
    return found


def _exact(inclusions: Sequence[float]) -> list[Fraction]:
    """Return the probabilities as fractions whose sum is whole: rounding has moved it by some 1e-16."""
    exact = [Fraction(value) for value in inclusions]
    missing = round(sum(exact)) - sum(exact)
    for i, value in enumerate(exact):
        moved = min(max(value + missing, Fraction(0)), Fraction(1)) if 0 < value < 1 else value
        exact[i], missing = moved, missing - (moved - value)
    return exact
