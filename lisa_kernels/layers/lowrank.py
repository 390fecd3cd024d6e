"""A linear layer with a low-rank slot, swapped in for a model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.basis import BasisTracker
from lisa_kernels.errors import InputError
from lisa_kernels.layers.freezing import replica_advice
from lisa_kernels.layers.linears import Place, is_conv1d, linear_shape
from lisa_kernels.layers.slot import BESIDE, SlotModule
from lisa_kernels.ops.lowrank_linear import capture_linear, linear, lowrank_linear, number_of
from lisa_kernels.ops.lowrank_linear.whole_weight import whole_weight
from lisa_kernels.uncompiled import uncompiled

HOOK_TABLES = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


class LowRankLinear(SlotModule, nn.Linear):  # type: ignore[misc]
    """y = x Wᵀ + b + scale · (x Pᵀ) B, with W frozen and the slot B trained while the layer is active.

    The weight and bias are the swapped layer's own parameters under their own names. It is a linear layer to others,
    such as transformers where it resizes an output layer. `passes`, see `ReadWeights`, are the threads in which a
    forward of the model runs, or ran and no step followed: who reads the weight then is about to multiply by it.
    """

    passes: Set[int] = frozenset()

    def __init__(self, original: nn.Module, rank: int, scale: float = 1.0, tracker: BasisTracker | None = None) -> None:
        assert isinstance(original.weight, nn.Parameter)
        super().__init__(linear_shape(original), original.weight.device, rank, scale, tracker)
        self.transposed = is_conv1d(original)
        # Of `_choose_basis`, once a basis was due.
        self._number: Tensor | None = None
        # One table with the swapped layer's: FSDP2 puts whole weights and shards in there by turns, and knows that one.
        own, self._parameters = self._parameters, original._parameters
        self._parameters.update(own)
        self.train(original.training)
        # Hooks that users put on the layer keep firing; the tables are shared, so later ones do too.
        for table in HOOK_TABLES:
            object.__setattr__(self, table, getattr(original, table))
        self._is_full_backward_hook = original._is_full_backward_hook

    @property
    def stored_weight(self) -> nn.Parameter:
        """The weight as it is stored, without the slot."""
        stored = self._parameters["weight"]
        assert stored is not None
        return stored

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The parameter; from a forward to the step, for code that goes past the layer, what the layer multiplies by.

        The gradient of that one reaches the slot, at the price of the gradient [m, n].
        """
        stored, folds = self.stored_weight, self.tracker is not None
        if not (self.active and self.passes) or (folds and not torch.is_grad_enabled()):
            return stored
        choose = self.refresh_basis if self.capturing else None
        whole = whole_weight(self.matrix, self.slot, self.basis, self.scale, folds, choose)
        return whole.t() if self.transposed else whole

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Refuse the plain tensor that a replica is given for its weight; parameters are registered past this."""
        raise InputError(replica_advice())

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., m] for x [..., n]."""
        folds = self.tracker is not None
        if not self.active or (folds and not torch.is_grad_enabled()):
            return linear(x, self.matrix, self.bias)
        # As rows: of three dimensions torch's biased linear is itself a view, which no model could change in place.
        rows = x.reshape(-1, self.in_features)
        # Compiled, all layers of a block take one way: refreshes come to them one by one, each would be a graph more.
        # One that finds no basis then keeps its input for the basis that it has.
        if self.capturing or (self.beside_capturing and torch.compiler.is_compiling()):
            y = capture_linear(rows, self.matrix, self.bias, self.slot, self._choose_basis, self._number)
        else:
            y = lowrank_linear(rows, self.matrix, self.bias, self.slot, self.basis, self.scale, folds)
        return y.view(*x.shape[:-1], self.out_features)

    def arm(self) -> None:
        """Settle whether backwards until the next step find a basis."""
        super().arm()
        if self.active and self.tracker is not None and self._number is None:
            self._number = number_of(self._choose_basis)

    def _choose_basis(self, dy: Tensor, x: Tensor) -> Tensor:
        assert self.tracker is not None
        return self.tracker.update_factored(dy, x, self.basis)


class TrainedBasisLinear(LowRankLinear):
    """A low-rank layer whose basis trains as its slot does, as LoRA has it: both are float32 parameters.

    Bytes while active: 4·r·(m + n), and as much for the gradients. The layer's input stays for the backward.
    """

    basis: nn.Parameter
    trains_basis = True

    def hold_basis(self, basis: Tensor) -> None:
        """Take a copy of a basis [r, n] for one's own, in float32 where the layer computes."""
        self.basis.data = basis.detach().to(self.device, torch.float32, copy=True)

    def free_basis(self) -> None:
        """Give up the basis, its storage and its gradient's."""
        self.basis.grad = None
        self.basis.data = torch.empty(0, device=self.slot.device)

    @property
    def trained(self) -> list[nn.Parameter]:
        """Slot and basis."""
        return [self.slot, self.basis]


@dataclass
class Swap:
    """One replaced layer: where it sits, under which root, what was there and what is there now."""

    path: str
    root: str
    parent: nn.Module
    name: str
    original: nn.Module
    layer: LowRankLinear

    def undo(self) -> None:
        """Put the original layer back, with the parameters as they are now."""
        # Each has a table of its own again.
        self.layer._parameters = dict(self.layer._parameters)
        for name in BESIDE:
            self.original._parameters.pop(name, None)
        self.original._is_full_backward_hook = self.layer._is_full_backward_hook
        if getattr(self.parent, self.name, None) is self.layer:
            # Else someone has put another layer there, which stays.
            setattr(self.parent, self.name, self.original)
        self.original.train(self.layer.training)


def swap_linears(places: Iterable[Place], make: Callable[[nn.Module, str], LowRankLinear]) -> list[Swap]:
    """Replace the layers at `places` by `make(layer, path)`; a module that sits in several places becomes one layer.

    When `make` raises, everything is put back.
    """
    places = list(places)
    swaps: list[Swap] = []
    made: dict[nn.Module, LowRankLinear] = {}
    try:
        for place in places:
            if place.layer not in made:
                made[place.layer] = make(place.layer, place.path)
            swaps.append(Swap(place.path, place.root, place.parent, place.name, place.layer, made[place.layer]))
            setattr(place.parent, place.name, made[place.layer])
    except BaseException:
        for swap in swaps:
            swap.undo()
        for place in places:
            # Of one that was being made when it failed.
            for name in BESIDE:
                place.layer._parameters.pop(name, None)
        raise
    return swaps


# Stands among the passes for forwards that are over and whose gradient no step has used yet.
TO_BE_STEPPED = 0


class ReadWeights:
    """Hooks that tell a model's low-rank layers when who reads their weight is about to multiply by it.

    Fused losses and kernels multiply by `lm_head.weight` and never call the layer: its slot would be left out and
    learn nothing. Some do so in the model's forward, others after it; so a forward that is trained on lasts to the
    step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._passes: set[int] = set()
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    @uncompiled
    def _begin(self, model: nn.Module, args: Any) -> None:
        self._passes.add(get_ident())
        for layer in model.modules():
            if isinstance(layer, LowRankLinear):
                layer.passes = self._passes

    @uncompiled
    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._passes.discard(get_ident())
        # A forward that failed has no output.
        if output is not None and model.training and torch.is_grad_enabled():
            self._passes.add(TO_BE_STEPPED)

    def end_pass(self) -> None:
        """Say that from here on who reads a weight wants the parameter."""
        self._passes.discard(TO_BE_STEPPED)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self.end_pass()
