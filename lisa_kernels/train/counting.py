"""How many optimizer steps a number of passes over the rows is."""

from __future__ import annotations

import math


def steps_of_passes(passes: float, rows: int, batch_size: int, accumulate: int) -> int:
    """Return the optimizer steps of so many passes over the rows, at least one.

    Each pass ends with what batches and accumulation leave over, as a smaller batch and a step of fewer batches. Of the
    last pass, where it is not whole, come that share of its rows, rounded up to the step.
    """

    def steps(rows: int) -> int:
        return math.ceil(math.ceil(rows / batch_size) / accumulate)

    whole = math.floor(passes)
    # Rounded before it is rounded up: 0.1 * 30 is a little above 3.
    share = math.ceil(round((passes - whole) * rows, 6))
    return max(1, whole * steps(rows) + steps(share))
