"""When a layer's basis is due, and what its backward does then."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lisa_kernels.basis.range_finder import first_basis, random_basis, refresh_basis


def stream_generator(seed: int, stream: int, activation: int) -> torch.Generator:
    """Return a generator for one matrix and activation, the three numbers kept apart by odd multipliers."""
    mixed = seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + activation * 0xA0761D6478BD642F
    return torch.Generator(device="cpu").manual_seed(mixed % (1 << 63))


@dataclass
class BasisTracker:
    """Follows one matrix's basis: none yet, in use, or due for a refresh.

    `gap` steps lie between two refreshes of one matrix (0: never again after the first); `offset` staggers matrices so
    that no step refreshes all. `stream` seeds the range finder: results depend on (seed, stream, activation) only.
    """

    rank: int
    gap: int
    offset: int
    seed: int
    stream: int
    activation: int = 0
    steps: int = 0
    due: bool = True
    has_basis: bool = False
    postponed: int = 0
    rotation: Tensor | None = field(default=None, repr=False)

    def start(self, activation: int) -> None:
        """Forget the basis: the layer begins period number `activation`."""
        self.activation, self.steps, self.due, self.has_basis, self.rotation = activation, 0, True, False, None

    def advance(self) -> None:
        """Count one optimizer step and decide whether the next backward refreshes the basis."""
        self.steps += 1
        if self.gap and (self.steps + self.offset) % self.gap == 0:
            self.due = True

    def _generator(self) -> torch.Generator:
        return stream_generator(self.seed, self.stream, self.activation)

    def update(self, gradient: Tensor, basis: Tensor) -> Tensor:
        """Write the basis that is due into `basis` [r, n] from `gradient` float32 [m, n], and return it.

        A gradient with a NaN or an infinity postpones a refresh and never reaches the basis, and so does one that is
        zero throughout and would leave arbitrary directions. Before the first basis the slot then gets random ones:
        its optimizer skips a step that is not finite, and a zero gradient is zero in every basis.
        """
        if not self.due:
            return basis
        largest = float(torch.linalg.vector_norm(gradient, math.inf))
        if not 0.0 < largest < math.inf:
            self.postponed += 1
            if not self.has_basis:
                basis.copy_(random_basis(self.rank, gradient.shape[1], self._generator(), gradient.device))
            return basis
        if self.has_basis:
            # A copy also where the basis is float32 already: it is overwritten below.
            old = basis.to(torch.float32, copy=True)
            basis.copy_(refresh_basis(gradient, old))
            self.rotation = basis.to(torch.float32) @ old.t()
        else:
            basis.copy_(first_basis(gradient, self.rank, self._generator()))
        self.due, self.has_basis = False, True
        return basis

    def state_dict(self) -> dict[str, int | bool]:
        """Return what a resumed run needs besides the basis itself."""
        names = ("activation", "steps", "due", "has_basis", "postponed")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Continue from `state_dict()`."""
        for name in ("activation", "steps", "due", "has_basis", "postponed"):
            setattr(self, name, type(getattr(self, name))(state[name]))
        self.rotation = None
