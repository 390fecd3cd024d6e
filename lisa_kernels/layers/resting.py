"""A low-rank layer whose weight rests in 8 or 4 bits where the model computes, its master in host memory."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.basis import BasisTracker
from lisa_kernels.errors import InputError
from lisa_kernels.layers.freezing import replica_advice
from lisa_kernels.layers.lowrank import LowRankLinear
from lisa_kernels.ops.lowrank_linear.whole_weight import whole_weight
from lisa_kernels.ops.resting import dequantize_resting_, quantize_resting
from lisa_kernels.ops.resting_linear import capture_resting_linear, resting_linear


class RestingLinear(LowRankLinear):
    """y = x Ŵᵀ + b + (x Pᵀ) B, Ŵ being what the codes mean; the slot B stays beside it until it is settled.

    What learns is the master, W + Bᵀ P: `settle` puts the slot into it, and quantises it anew. Between two of these the
    device never holds the layer in 16 bits as a whole but one matrix at a time, within a product. The master is the
    parameter itself; on a model that computes elsewhere it moves to host memory, page-locked, and stays there after
    `detach()`.

    Bytes on the device: 1.0625 (int8) or 0.5625 (nf4) a weight, and those of an active slot.
    """

    def __init__(self, original: nn.Module, rank: int, kind: str, tracker: BasisTracker, path: str) -> None:
        super().__init__(original, rank, tracker=tracker)
        self.kind = kind
        device = self.stored_weight.device
        self.register_buffer("codes", torch.empty(0, dtype=torch.uint8, device=device), persistent=False)
        self.register_buffer("absmax", torch.empty(0, device=device), persistent=False)
        # What weight decay has left of the master since it was settled, as a factor.
        self.register_buffer("kept", torch.ones((), device=device), persistent=False)
        self._rest(self.stored_weight.detach())
        if not self.absmax.is_meta and not bool(self.absmax.isfinite().all()):
            raise InputError(
                f"{path}.weight is to rest in few bits and holds a NaN or an infinity; give a model whose weights are "
                "finite."
            )
        self.stored_weight.data = _in_host_memory(self.stored_weight.detach())

    codes: Tensor
    absmax: Tensor
    kept: Tensor

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return self.codes.device

    @property
    def is_adapter(self) -> bool:
        """Whether the slot is a part of the layer's function: while it is active."""
        return self.active

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The master; within a forward, for code that goes past the layer, what the layer multiplies by."""
        if get_ident() not in self.passes:
            return self.stored_weight
        woken = self._woken()
        if self.active:
            choose = self.refresh_basis if self.capturing and torch.is_grad_enabled() else None
            woken = whole_weight(woken, self.slot, self.basis, self.scale, choose is not None, choose)
        return woken.t() if self.transposed else woken

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Refuse the plain tensor that a replica is given for its weight."""
        raise InputError(replica_advice())

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., m] for x [..., n]."""
        weight = self.codes, self.absmax, self.kind, self.out_features
        if not self.active:
            return resting_linear(x, *weight, self.bias)
        rows = x.reshape(-1, self.in_features)
        if self.capturing and torch.is_grad_enabled():
            y = capture_resting_linear(rows, *weight, self.bias, self.slot, self._choose_basis)
        else:
            y = resting_linear(rows, *weight, self.bias, self.slot, self.basis, self.scale)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def settle(self, key: Tensor | None) -> None:
        """Put the slot into the master, quantise that anew, and begin again at zero; `key` rounds a 16-bit master."""
        master = self._master_here()
        self.fold_into(master, self.kept, key)
        self._rest(master)
        if master is not self.stored_weight:
            self.stored_weight.data.copy_(master)
        self.slot.data.zero_()
        self.kept.fill_(1.0)

    def rest_anew(self) -> None:
        """Quantise the master as it is now: something else has written to it."""
        self._rest(self._master_here().detach())
        self.kept.fill_(1.0)

    def deactivate(self, keep: bool = False) -> None:
        """Free the slot's storage, its gradient's, and the basis unless it is kept; the master is as it was settled."""
        super().deactivate(keep)
        self.kept.fill_(1.0)

    @torch.no_grad()
    def add_slot_(self, weight: Tensor) -> Tensor:
        """Make a copy of the master what the layer has learnt, in place; returns it."""
        here = weight if weight.device == self.device else weight.to(self.device)
        self.fold_into(here, self.kept, None)
        return weight if here is weight else weight.copy_(here)

    def _rest(self, master: Tensor) -> None:
        stored = master.t() if self.transposed else master
        self.codes, self.absmax = quantize_resting(stored.contiguous(), self.kind)

    def _master_here(self) -> Tensor:
        """Return the master where the layer computes: itself, or a copy while it is worked on."""
        stored = self.stored_weight
        # One that takes no memory is a plan's, of a device that does not hold it.
        if stored.device == self.device and stored.is_contiguous():
            return stored
        return torch.empty(stored.shape, dtype=stored.dtype, device=self.device).copy_(stored)

    def _woken(self) -> Tensor:
        weight = self.stored_weight
        out = torch.empty(self.out_features, self.in_features, dtype=weight.dtype, device=self.device)
        return dequantize_resting_(out, self.codes, self.absmax, self.kind)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Leave the master where it is when the model moves."""
        names, master = list(self._parameters), self._parameters.pop("weight")
        try:
            super()._apply(fn, recurse)
        finally:
            rest = dict(self._parameters)
            self._parameters.clear()
            self._parameters.update({name: master if name == "weight" else rest[name] for name in names})
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load the layer's function as a plain weight, and let it rest."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.rest_anew()

    def extra_repr(self) -> str:
        """Describe the layer as its base does, and how it rests."""
        return f"{super().extra_repr()}, resting={self.kind}"


def hold_masters(model: nn.Module) -> None:
    """Give masters without values the memory that they take where a model computes in host memory: for a plan."""
    for layer in model.modules():
        if isinstance(layer, RestingLinear):
            layer.stored_weight.data = torch.empty_like(layer.stored_weight, memory_format=torch.contiguous_format)


def _in_host_memory(weight: Tensor) -> Tensor:
    """Return a weight as its master is kept; of one without values, a plan's, nothing that takes memory."""
    if weight.device.type == "cpu":
        return weight
    if weight.is_meta:
        return torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
    return torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True).copy_(weight)
