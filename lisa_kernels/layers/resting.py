"""A low-rank layer whose weight rests in 8 or 4 bits where the model computes, its master in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.basis import BasisTracker
from lisa_kernels.errors import InputError
from lisa_kernels.layers.accumulating import AccumulatingSlot
from lisa_kernels.layers.codes_home import CodesHome, OnDevice
from lisa_kernels.layers.freezing import replica_advice
from lisa_kernels.layers.lowrank import LowRankLinear, TrainedBasisLinear
from lisa_kernels.ops.lent_linear import capture_lent_linear, lent_linear
from lisa_kernels.ops.lowrank_linear.whole_weight import whole_weight
from lisa_kernels.ops.resting import RestingWeight, code_count, quantize_resting, scale_count
from lisa_kernels.ops.resting_linear import capture_resting_linear, resting_linear


class RestingLinear(AccumulatingSlot, LowRankLinear):  # type: ignore[misc]
    """y = x Ŵᵀ + b + s · (x Pᵀ) B, Ŵ being what the codes mean; the slot B stays beside it until it is settled.

    Without a tracker it is an adapter's, and stays for good: the master is what it was until adapters are merged.

    Between two of these the device never holds the layer in 16 bits but a tile of it at a time, within a product. The
    master is the parameter itself, see `AccumulatingSlot`.

    Bytes at `codes_home`: 1.0176 (int8) or 0.5176 (nf4) a weight; on the device those of an active slot.
    """

    def __init__(
        self, original: nn.Module, rank: int, kind: str, tracker: BasisTracker | None, path: str, scale: float = 1.0,
        codes_home: CodesHome | None = None,
    ) -> None:  # fmt: skip
        super().__init__(original, rank, scale, tracker)
        self.kind, self.codes_home = kind, codes_home or OnDevice()
        device = self.stored_weight.device
        self.register_buffer("codes", torch.empty(0, dtype=torch.uint8, device=device), persistent=False)
        self.register_buffer("scales", torch.empty(0, dtype=torch.uint8, device=device), persistent=False)
        weight = self._at_rest(self.stored_weight.detach())
        if not weight.is_finite():
            raise InputError(
                f"{path}.weight is to rest in few bits and holds a NaN or an infinity; give a model whose weights are "
                "finite."
            )
        self.codes_home.put(self, weight, 0)
        self._keep_master()

    codes: Tensor
    scales: Tensor

    @property
    def resting(self) -> RestingWeight:
        """The weight [m, n] as it rests where the layer computes; see `codes_home`, which has it there."""
        return RestingWeight(self.codes, self.scales, self.kind, self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The master; within a forward, for code that goes past the layer, what the layer multiplies by."""
        if get_ident() not in self.passes:
            return self.stored_weight
        with self.lend() as weight:
            woken = weight.woken(self.stored_weight.dtype)
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
        if not self.active:
            return self._times(x)
        rows = x.reshape(-1, self.in_features)
        if not (self.capturing and torch.is_grad_enabled()):
            y = self._times(rows, self.slot, self.basis, self.scale)
        elif self.codes_home.stays:
            y = capture_resting_linear(rows, *self.resting[:4], self.bias, self.slot, self._choose_basis)
        else:
            y = capture_lent_linear(rows, self.lend, self.bias, self.slot, self._choose_basis)
        return y.view(*x.shape[:-1], self.out_features)

    def _times(self, x: Tensor, *beside: Any) -> Tensor:
        if self.codes_home.stays:
            return resting_linear(x, *self.resting[:4], self.bias, *beside)
        return lent_linear(x, self.lend, self.bias, *beside)

    def lend(self) -> AbstractContextManager[RestingWeight]:
        """Lend the weight [m, n] as it rests to what is queued inside."""
        return self.codes_home.lend(self)

    def rest_in(self, kind: str) -> None:
        """Rest in other bits from now on: for codes that are where the layer computes, or none for the time being."""
        assert self.codes_home.stays
        self.kind, elements = kind, self.out_features * self.in_features
        if not self.codes.numel():
            return
        self.codes = self.codes.new_empty((code_count(elements, kind),))
        self.scales = self.scales.new_empty((scale_count(elements),))
        self.rest_anew()

    def _at_rest(self, stored: Tensor) -> RestingWeight:
        """Return the whole weight in codes, or rows of it, from a master as it is stored."""
        matrix = stored.t() if self.transposed else stored
        codes, scales = quantize_resting(matrix.contiguous(), self.kind)
        return RestingWeight(codes, scales, self.kind, *matrix.shape)

    def _rest_rows(self, here: Tensor, rows: slice) -> None:
        self.codes_home.put(self, self._at_rest(here), 0 if self.transposed else rows.start)

    def _tiles(self, weight: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        if not self.transposed:
            yield from super()._tiles(weight)
            return
        # Blocks of neighbours in the codes are not in the rows of such a weight.
        yield slice(0, len(self.stored_weight)), self._whole() if weight is None else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Leave the master where it is when the model moves."""
        names, master = list(self._parameters), self._parameters.pop("weight")
        try:
            super()._apply(fn, recurse)
        finally:
            rest = dict(self._parameters)
            self._parameters.clear()
            self._parameters.update({name: master if name == "weight" else rest[name] for name in names})
        self._follow()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load the layer's function as a plain weight, and let it rest."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.rest_anew()

    def extra_repr(self) -> str:
        """Describe the layer as its base does, and how it rests."""
        return f"{super().extra_repr()}, resting={self.kind}"


class RestingTrainedBasisLinear(RestingLinear, TrainedBasisLinear):  # type: ignore[misc]
    """An adapter beside a weight that rests, of which both factors train, as LoRA has it."""
