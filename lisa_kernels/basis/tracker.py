"""When a layer's basis is due, and what its backward does then."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lisa_kernels.basis.gradients import FactoredGradient, Gradient, SharedGradient
from lisa_kernels.basis.orthonormal import deviation
from lisa_kernels.basis.random_rows import RandomRows
from lisa_kernels.basis.range_finder import find_first, find_refreshed
from lisa_kernels.ops.autocast import no_autocast

# Of |P Pᵀ − 1|. A basis rounded to bfloat16 deviates by up to 0.008.
LOST = 0.05


class Heard:
    """A bool 0-d tensor that the host comes to know, without waiting for the device; of other devices it never does."""

    def __init__(self, tensor: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._value = tensor if tensor.device.type == "cpu" else torch.zeros((), dtype=torch.bool, device="cpu")
        if tensor.is_cuda:
            self._value = self._value.pin_memory().copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.current_stream(tensor.device).record_event()
        elif tensor.is_meta:
            # Of a rehearsal, where all gradients are good.
            self._value.fill_(True)

    def is_true(self) -> bool:
        """Return whether the host knows by now that it is true."""
        return (self._copied is None or self._copied.query()) and bool(self._value)

    def wait(self) -> bool:
        """Return whether it is true, once the host knows."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._value)


@dataclass
class BasisTracker:
    """Follows one matrix's basis: none yet, in use, or due for a refresh.

    `gap` steps lie between two refreshes of one matrix (0: never again after the first); `offset` staggers matrices so
    that no step refreshes all. Random rows are a function of (seed, stream, activation + steps) only.

    When a basis is due is settled on the host, what becomes of it on the device, and neither waits for the other: a
    gradient that is not finite, or zero, leaves the basis as it is until the next refresh. So that a first basis is
    not long in random directions then, it is tried again after 1 to 7 steps, 8 to 63 …, up to the gap. Where the host
    has heard by then that the first gradient was good, this is left out; where it has not, the device throws the work
    away, which comes to the same. `early` False leaves it out in any case, for gradients known to be good.

    `summed` adds up a tensor over the ranks that train together: gradients are then the sums of theirs, bases the same
    on all of them, and the host waits until it has heard, for all ranks have to do the same. `of_first` puts what rank
    0 has into a tensor, where the others' products may differ in their last bits. `waits` has the host wait in any
    case: where a basis that is due changes more than itself, equal runs have to agree about it.
    """

    rank: int
    gap: int
    offset: int
    seed: int
    stream: int
    early: bool = True
    summed: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    of_first: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    waits: bool = False
    activation: int = 0
    steps: int = 0
    due: bool = True
    has_basis: bool = False
    retrying: bool = False
    # Of the last refresh, until `take_turn` asks for it: P_new P_oldᵀ and P_old, float32.
    rotation: Tensor | None = field(default=None, repr=False)
    _old: Tensor | None = field(default=None, repr=False)
    # How often a basis was (not refreshed, found broken and re-made): what a state brought, and since, on the device.
    _counted: tuple[int, int] = field(default=(0, 0), repr=False)
    _counts: Tensor | None = field(default=None, repr=False)
    # Whether a gradient has had a say in the basis since the start; on the device from the first update on.
    _found: Tensor | bool = field(default=False, repr=False)
    # The same on its way to the host.
    _heard: Heard | None = field(default=None, repr=False)

    def start(self, activation: int) -> None:
        """Forget the basis: the layer begins period number `activation`."""
        self.activation, self.steps, self.due, self.has_basis = activation, 0, True, False
        self.rotation, self._old = None, None
        self.retrying, self._found, self._heard = False, False, None

    def take_turn(self) -> tuple[Tensor, Tensor] | None:
        """Return once what the last refresh did, float32 (P_new P_oldᵀ [r, r], P_old [r, n]), or None without one."""
        rotation, old = self.rotation, self._old
        self.rotation, self._old = None, None
        return None if rotation is None or old is None else (rotation, old)

    def advance(self) -> None:
        """Count one optimizer step and decide whether the next backward refreshes the basis."""
        self.steps += 1
        if self.gap and (self.steps + self.offset) % self.gap == 0:
            self.due, self.retrying = True, False
        elif not self.due and self._early():
            self.due = self.retrying = True

    def _early(self) -> bool:
        """Return whether a first basis is tried again: once between two powers of 8, staggered as refreshes are."""
        power = 8 ** ((self.steps.bit_length() - 1) // 3)
        its_turn = self.steps < self.gap and self.steps == power + 7 * power * self.offset // self.gap
        if not (self.early and its_turn):
            return False
        if self._heard is None:
            return True
        return not (self._heard.wait() if self.waits or self.summed is not None else self._heard.is_true())

    def update(self, gradient: Gradient, basis: Tensor) -> Tensor:
        """Write the basis that is due into `basis` [r, n] from `gradient` [m, n], and return it.

        A gradient with a NaN or an infinity never reaches the basis, and neither does one that is zero throughout.
        Before the first basis the slot then gets random directions: its optimizer skips a step that is not finite, and
        a zero gradient is zero in every basis.
        """
        return self._update(gradient, basis) if self.due else basis

    def update_factored(self, dy: Tensor, x: Tensor, basis: Tensor) -> Tensor:
        """Do what `update` does for G = dYᵀ x, of dy [tokens, m] and x [tokens, n], without forming it if it can."""
        return self.update(FactoredGradient(dy, x), basis)

    @torch.no_grad()
    def _update(self, gradient: Gradient, basis: Tensor) -> Tensor:
        if self.summed is not None:
            gradient = SharedGradient(gradient, self.summed)  # type: ignore[arg-type]
        # Autocast, where a backward runs under it, would make products of 16-bit numbers of these.
        with no_autocast(basis.device.type):
            usable, lost = self._refresh(gradient, basis) if self.has_basis else self._find(gradient, basis)
        seen = torch.stack([~usable, lost]).to(torch.int64)
        if self.of_first is not None:
            self._take_first(self.of_first, seen, basis)
            usable = seen[0] == 0
        self._counts = seen if self._counts is None else self._counts + seen
        self.due, self.retrying, self.has_basis = False, False, True
        self._found = usable | self._found
        # After the gap nobody asks, and on a GPU it would hold locked memory and an event.
        self._heard = Heard(self._found) if self.early and self.steps < self.gap else None
        return basis

    def _take_first(self, of_first: Callable[[Tensor], Tensor], seen: Tensor, basis: Tensor) -> None:
        """Take rank 0's word for what became of the basis, and what its moments are turned by."""
        of_first(seen)
        of_first(basis)
        if self.rotation is not None:
            of_first(self.rotation)

    def _rows(self) -> RandomRows:
        return RandomRows(self.seed, self.stream, self.activation + self.steps)

    def _find(self, gradient: Gradient, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Write a first basis; returns bool 0-d whether the gradient was usable, and that nothing was lost."""
        found = find_first(gradient, self.rank, self._rows())
        basis.copy_(found.basis)
        return found.usable, torch.zeros_like(found.usable)

    def _refresh(self, gradient: Gradient, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Refresh the basis; returns bool 0-d whether the gradient was usable, and whether the old basis was broken."""
        # A copy also where the basis is float32 already: it is overwritten below.
        old = basis.to(torch.float32, copy=True)
        lost = ~(deviation(old) < LOST)
        # Any orthonormal rows will do to begin again from.
        old = torch.where(lost, torch.eye(*old.shape, dtype=old.dtype, device=old.device), old)
        found = find_refreshed(gradient, old, self._rows())
        wanted = found.usable
        if self.retrying:
            wanted = wanted & (lost | ~torch.as_tensor(self._found, device=basis.device))
        basis.copy_(torch.where(wanted, found.basis, old))
        unit = torch.eye(self.rank, dtype=old.dtype, device=old.device)
        self.rotation, self._old = torch.where(wanted, basis.to(torch.float32) @ old.t(), unit), old
        return found.usable, lost

    @property
    def postponed(self) -> int:
        """How many gradients were of no use where a basis was due; waits for the device."""
        return self._read_counts()[0]

    @property
    def remade(self) -> int:
        """How many bases were found to have lost orthonormality and were made anew; waits for the device."""
        return self._read_counts()[1]

    def _read_counts(self) -> tuple[int, int]:
        """Add what the device counted, and warn of bases that were found broken since the last time."""
        if self._counts is not None:
            postponed, remade = self._counts.tolist()
            self._counts = None
            self._counted = self._counted[0] + postponed, self._counted[1] + remade
            if remade:
                warnings.warn(
                    f"the basis of matrix {self.stream} had lost its orthonormality {remade} times when it was "
                    "refreshed, and was made anew; something else writes to it.",
                    stacklevel=3,
                )
        return self._counted

    def state_dict(self) -> dict[str, int | bool]:
        """Return what a resumed run needs besides the basis itself; waits for the device."""
        names = ("activation", "steps", "due", "has_basis", "retrying", "postponed", "remade")
        return {**{name: getattr(self, name) for name in names}, "found": bool(self._found)}

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Continue from `state_dict()`."""
        for name in ("activation", "steps", "due", "has_basis", "retrying"):
            setattr(self, name, type(getattr(self, name))(state[name]))
        self._found = bool(state["found"])
        self._heard = Heard(torch.tensor(self._found))
        self._counted, self._counts = (int(state["postponed"]), int(state["remade"])), None
        self.rotation, self._old = None, None
