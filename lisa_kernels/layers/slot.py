"""What every layer with a low-rank slot has: the slot, the basis, and when they own storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.basis import BasisTracker, Gradient, ScatteredGradient
from lisa_kernels.distributed.shards import first_row, local
from lisa_kernels.errors import InputError
from lisa_kernels.ops.fold import fold_

# Parameters that are not the layer's own.
BESIDE = ("slot", "basis")


class SlotModule(nn.Module):
    """A weight [m, n] that trains through a slot B [r, m] beside it, read with a basis P [r, n].

    The slot is a parameter (float32) and the basis a buffer (the weight's dtype); both are empty while the layer is
    inactive and neither is ever in `state_dict()`. With a tracker the basis comes from gradients and the slot is
    folded into the weight after each step; without one (LoRA-FA) the basis is fixed and the slot stays: the weight that
    `state_dict()` then holds is W + scale · Bᵀ P, so that what anyone saves is what was trained.

    With `exact_master` a bfloat16 weight has a remainder beside it while it is active, which makes it a float32 master
    weight: updates far below a bfloat16's step then add up without rounding noise.

    Where ranks share the weight out, slot and basis are whole on each of them, and the remainder is of its rows.

    Bytes while active: 4·r·m for the slot, as much for its gradient, r·n weights for the basis, 2·m·n for a remainder.
    """

    weight: Tensor
    basis: Tensor
    remainder: Tensor
    # Whether the basis is a parameter as the slot is, in float32.
    trains_basis = False

    def __init__(
        self, shape: tuple[int, int], device: torch.device, rank: int, scale: float = 1.0,
        tracker: BasisTracker | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.rank, self.scale, self.tracker = rank, scale, tracker
        # Whether the weight is stored [n, m].
        self.transposed = False
        self.capturing = False
        # Whether a layer of the same block does.
        self.beside_capturing = False
        self.exact_master = False
        # Whether weights were loaded in the place of an adapter that had been trained.
        self.restarted = False
        # On the weight's device from the start: who asks an empty slot for its device is about to make something there.
        self.slot = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        if self.trains_basis:
            self.basis = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        else:
            self.register_buffer("basis", torch.empty(0, device=device), persistent=False)
        # int16 once it holds something: what sends a model's buffers to other processes has no such numbers.
        self.register_buffer("remainder", torch.empty(0, device=device), persistent=False)

    @property
    def stored_weight(self) -> nn.Parameter:
        """The weight as it is stored, without the slot."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where slot and basis are."""
        return self.stored_weight.device

    @property
    def matrix(self) -> Tensor:
        """The stored weight read as [m, n]; a view."""
        return self.stored_weight.t() if self.transposed else self.stored_weight

    @property
    def active(self) -> bool:
        """Whether the slot owns storage."""
        return self.slot.numel() > 0

    def activate(self, basis: Tensor | None = None, remainder: Tensor | None = None) -> None:
        """Give the slot and the basis their storage; the slot is zero, the basis `basis` or to be found.

        remainder: that of the layer's last time, instead of zeros.
        """
        device, dtype = self.device, self.stored_weight.dtype
        self.slot.data = torch.zeros(self.rank, self.out_features, device=device)
        if basis is None:
            self.basis = torch.zeros(self.rank, self.in_features, device=device, dtype=dtype)
        else:
            self.hold_basis(basis)
        if self.exact_master and dtype == torch.bfloat16:
            zeros = torch.zeros_like(local(self.stored_weight), dtype=torch.int16)
            self.remainder = zeros if remainder is None else zeros.copy_(remainder)

    def hold_basis(self, basis: Tensor) -> None:
        """Take a copy of a basis [r, n] for one's own, in the weight's dtype on its device."""
        self.basis = basis.to(self.device, self.stored_weight.dtype, copy=True)

    def free_basis(self) -> None:
        """Give up the basis and its storage."""
        self.basis = torch.empty(0, device=self.slot.device)

    @property
    def trained(self) -> list[nn.Parameter]:
        """What an optimizer moves while the layer is active."""
        return [self.slot]

    def arm(self) -> None:
        """Settle whether backwards until the next step find a basis, because one is due, and keep all that it takes.

        The choice holds for the whole step: what gradient checkpointing recomputes must be what the forward did, and
        the first of several backwards already makes the basis.
        """
        self.capturing = self.active and self.tracker is not None and self.tracker.due

    def deactivate(self, keep: bool = False) -> None:
        """Free the slot's storage, its gradient's, and those of basis and remainder unless they are kept."""
        self.capturing = False
        self.slot.grad = None
        self.slot.data = torch.empty(0, device=self.slot.device)
        if not keep:
            self.free_basis()
            self.remainder = torch.empty(0, device=self.slot.device)

    def lifting_factors(self) -> tuple[Tensor, Tensor]:
        """Return (left, right) with leftᵀ · right = scale · Bᵀ P in the weight's own order."""
        slot = self.slot.data if self.scale == 1.0 else self.slot.data * self.scale
        return (self.basis, slot) if self.transposed else (slot, self.basis)

    @property
    def is_adapter(self) -> bool:
        """Whether the slot stays beside the weight and is a part of the layer's function now."""
        return self.active and self.tracker is None

    @property
    def is_merged(self) -> bool:
        """Whether the slot of an adapter is in the weight for the time being."""
        return self.tracker is None and not self.active

    @torch.no_grad()
    def fold_into(self, weight: Tensor, decay: Tensor, key: Tensor | None, remainder: Tensor | None = None) -> None:
        """Replace a weight, the layer's own or a copy of it, by decay · W + scale · Bᵀ P, as `fold_` has it.

        Of one that is shared out the rows that are here.
        """
        rows = local(weight)
        if rows.numel():
            self.fold_rows(rows, first_row(weight), decay, key, remainder)

    @torch.no_grad()
    def fold_rows(
        self, rows: Tensor, first: int, decay: Tensor, key: Tensor | None, remainder: Tensor | None = None
    ) -> None:
        """Do what `fold_into` does to rows of a weight as it is stored, of which `first` is the number of the first."""
        left, right = self.lifting_factors()
        start = first * rows.shape[1]
        fold_(rows, left[:, first : first + len(rows)], right, decay=decay, key=key, remainder=remainder, start=start)

    @torch.no_grad()
    def add_slot_(self, weight: Tensor) -> Tensor:
        """Add scale · Bᵀ P to a weight, the layer's own or a copy of it, in place; returns it."""
        # To nearest, which errs least where a weight is rounded once; steps round often, and so stochastically.
        self.fold_into(weight, self.slot.new_ones(()), None)
        return weight

    def refresh_basis(self, gradient: Gradient) -> Tensor:
        """Make the basis that is due, from the weight's gradient [m, n], and return the one in use."""
        assert self.tracker is not None
        return self.tracker.update(gradient, self.basis)

    @property
    def shares_basis(self) -> bool:
        """Whether several ranks find the basis together."""
        return self.tracker is not None and self.tracker.summed is not None

    def refresh_from_rows(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Do what `refresh_basis` does for a table's gradient, of which other ranks have rows of other ids."""
        return self.refresh_basis(ScatteredGradient(rows, ids, self.out_features))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save the layer's function as a plain weight; an adapter's is made here, one layer at a time, in host memory.

        Such a tensor is a copy: what is written into it does not reach the layer.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # The basis too, where it is a parameter.
        for name in BESIDE:
            destination.pop(f"{prefix}{name}", None)
        # A table is saved by the embedding that has it.
        if self.is_adapter and f"{prefix}weight" in destination:
            destination[f"{prefix}weight"] = self.saved_in(destination)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load the layer's function as a plain weight; an adapter begins anew at zero, being in the weight.

        A weight equal to what is here changes nothing. Raises InputError while adapters are merged.
        """
        if self.is_merged:
            raise InputError("the adapters are merged into the weights; call unmerge() before weights are loaded.")
        key = f"{prefix}weight"
        given = state_dict.get(key)
        fits = isinstance(given, Tensor) and given.shape == self.stored_weight.shape
        changes = fits and not self.holds(given)
        if fits and not changes:
            state_dict[key] = self.stored_weight
        # What trains beside the weight is never saved: hand over what is here, so that strict loading misses nothing.
        beside = {f"{prefix}{name}": param for name, param in self.named_parameters(recurse=False) if name in BESIDE}
        state_dict.update(beside)
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in beside:
            del state_dict[name]
        if changes and self.is_adapter:
            self.restarted = self.restarted or bool(self.slot.any())
            self.begin_anew()

    def saved_in(self, destination: dict[str, Any]) -> Tensor:
        """Return the layer's function as a plain weight in host memory, to be saved in `destination`."""
        return self._merged().cpu()

    def begin_anew(self) -> None:
        """Forget what the slot has learnt: it is in the weight, or the weight is another."""
        self.slot.data.zero_()

    def _merged(self) -> Tensor:
        return self.add_slot_(self.stored_weight.detach().clone()) if self.is_adapter else self.stored_weight.detach()

    def holds(self, weight: Tensor) -> bool:
        """Return whether a weight is the layer's function as it would be saved."""
        return torch.equal(weight.to(self.stored_weight.device, self.stored_weight.dtype), self._merged())

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, active={self.active}"
        )
