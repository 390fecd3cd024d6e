"""Fixed-size sampling designs: which subsets are drawn, and how often each item is in one.

Two designs for unequal weights `w`, each with its draw and its true inclusion probabilities:

* systematic: the probabilities are `size * w / sum(w)`, capped at 1, and one uniform number picks the subset;
* race: item `i` arrives after an exponential time of rate `w_i` and the first `size` are taken, which is the same
  as drawing one after another without replacement, each time in proportion to the weights of those left.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import accumulate

from lisa_kernels.samplers.base import random_order

# Above this an item counts as certain: it keeps the rounding of a cumulative sum from picking an item twice.
_CERTAIN = 1.0 - 1e-12


def capped_inclusions(weights: Sequence[float], size: int) -> list[float]:
    """Return probabilities proportional to the weights, summing to `size`, none above 1.

    Those above 1 are set to 1 and the rest is rescaled, repeatedly. At least `size` weights are positive.
    """
    inclusions = [0.0] * len(weights)
    open_items = [i for i, weight in enumerate(weights) if weight > 0]
    remaining = size
    while open_items and remaining:
        top = max(weights[i] for i in open_items)
        shares = {i: weights[i] / top for i in open_items}
        scale = remaining / math.fsum(shares.values())
        certain = [i for i in open_items if scale * shares[i] >= _CERTAIN]
        if not certain:
            for i in open_items:
                inclusions[i] = scale * shares[i]
            break
        for i in certain:
            inclusions[i] = 1.0
        open_items = [i for i in open_items if inclusions[i] == 0.0]
        remaining -= len(certain)
    return inclusions


def systematic_draw(inclusions: Sequence[float], stream: random.Random) -> tuple[int, ...]:
    """Return a subset whose items are included with exactly these probabilities; its size is their sum.

    The items are laid end to end in random order, each as long as its probability, and those hit by the points
    u, u + 1, u + 2, … are taken (randomised systematic sampling, Goodman and Kish 1950).
    """
    chosen = [i for i, probability in enumerate(inclusions) if probability >= 1.0]
    order = random_order([i for i, probability in enumerate(inclusions) if 0.0 < probability < 1.0], stream)
    ends = list(accumulate(inclusions[i] for i in order))
    if ends:
        ends[-1] = float(round(ends[-1]))
    start = stream.random()
    points_before = 0
    for item, end in zip(order, ends):
        points = math.ceil(end - start)
        if points > points_before:
            chosen.append(item)
        points_before = points
    return tuple(sorted(chosen))


def race_draw(weights: Sequence[float], size: int, stream: random.Random) -> tuple[int, ...]:
    """Return the `size` items that arrive first; items of weight 0 never do."""
    arrivals = [(-math.log1p(-stream.random()) / weight, i) for i, weight in enumerate(weights) if weight > 0]
    return tuple(sorted(i for _, i in sorted(arrivals)[:size]))


def race_inclusions(weights: Sequence[float], size: int) -> list[float]:
    """Return each item's probability of being among the first `size` arrivals, to about 1e-9.

    It is the integral over t of w e^(-wt) P(fewer than `size` others arrived by t), taken by the trapezoidal rule
    in log t, which converges geometrically there.
    """
    top = max(weights)
    rates = [weight / top for weight in weights]
    ranked = sorted((rate for rate in rates if rate > 0), reverse=True)
    if len(ranked) == size:
        return [1.0 if rate > 0 else 0.0 for rate in rates]
    # Before the first time nothing has arrived; after the last, `size` others have arrived but for e^-40.
    first, last = math.log(1e-11), math.log(40.0 / ranked[size])
    return _trapezoid(lambda log_time: _race_densities(rates, size, math.exp(log_time)), first, last)


def _race_densities(rates: Sequence[float], size: int, time: float) -> list[float]:
    """Return, per item, the density over log time of arriving now as one of the first `size`."""
    waiting = [math.exp(-rate * time) for rate in rates]
    arrived = [-math.expm1(-rate * time) for rate in rates]
    counts = [1.0]
    for here, not_yet in zip(arrived, waiting):
        counts = [not_yet * a + here * b for a, b in zip([*counts, 0.0], [0.0, *counts])]
    return [
        rate * time * not_yet * _fewer_others(counts, here, not_yet, size)
        for rate, here, not_yet in zip(rates, arrived, waiting)
    ]


def _fewer_others(counts: Sequence[float], arrived: float, waiting: float, size: int) -> float:
    """Return P(fewer than `size` of the others have arrived), given the distribution of the count of all.

    Divides the generating polynomial by (waiting + arrived z), from the end at which the division is stable.
    """
    total, quotient = 0.0, 0.0
    if arrived <= waiting:
        for count in counts[:size]:
            quotient = (count - arrived * quotient) / waiting
            total += quotient
    else:
        for others in range(len(counts) - 2, -1, -1):
            quotient = (counts[others + 1] - waiting * quotient) / arrived
            total += quotient if others < size else 0.0
    return total


def _trapezoid(densities: Callable[[float], list[float]], first: float, last: float) -> list[float]:
    """Integrate each component over [first, last], halving the step until nothing moves by more than 1e-9."""
    intervals = math.ceil((last - first) / 0.5)
    step = (last - first) / intervals
    columns = zip(*(densities(first + step * i) for i in range(intervals + 1)))
    totals = [step * (math.fsum(column) - 0.5 * (column[0] + column[-1])) for column in columns]
    for _ in range(10):
        middles = zip(*(densities(first + step * (i + 0.5)) for i in range(intervals)))
        refined = [0.5 * (total + step * math.fsum(column)) for total, column in zip(totals, middles)]
        change = max(abs(new - old) for new, old in zip(refined, totals))
        totals, step, intervals = refined, 0.5 * step, 2 * intervals
        if change < 1e-9:
            break
    return totals
