"""Random rows of a range finder: made on the device, and a function of three numbers and of their place."""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.ops.random_bits import number_key, random_floats

# Beyond the indices that parameters and their rewritten moments use.
FIRST_STREAM = 2 << 32


class RandomRows:
    """Draws rows one after the other, the same on every device, each draw anew from the first for equal numbers.

    Nothing is copied from the host, and nothing waits.
    """

    def __init__(self, seed: int, stream: int = 0, moment: int = 0) -> None:
        self.key = number_key(seed, FIRST_STREAM + stream, moment)
        self._drawn = 0

    def draw(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return float32 [rows, columns] in random directions, of expected squared length 1."""
        count = rows * columns
        numbers = random_floats(self.key, self._drawn, count, device)
        self._drawn += count
        return numbers.mul_(columns**-0.5).view(rows, columns)
