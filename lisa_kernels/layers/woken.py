"""A layer that computes with its 16-bit master while it trains, and with codes of it while it rests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.layers.lowrank import LowRankLinear
from lisa_kernels.layers.resting import RestingLinear
from lisa_kernels.ops.resting import bytes_at_rest


class WokenLinear(RestingLinear):
    """A layer at rest that `wake` makes an ordinary one: its weight is then on the device in the model's dtype.

    The weight trains in full there or, of a layer with a tracker, through a slot that is folded into it after each
    step. `rest` takes it back to the master in host memory and lets the layer rest in codes of what it learnt. On a
    model that computes in host memory the master itself trains.

    Bytes on the device: 1.0176 (int8) or 0.5176 (nf4) a weight at rest, those of the weight awake.
    """

    accumulates = False
    awake = False

    def _keep_master(self) -> None:
        """Have the weight be a master, which `share` moves to where masters are kept."""
        # The master while its copy trains on the device.
        self._master: Tensor | None = None

    @property
    def is_mapped(self) -> bool:
        """Whether the weight is what a file has: while the layer rests."""
        return super().is_mapped and not self.awake

    @property
    def is_adapter(self) -> bool:
        """Never: the slot is folded."""
        return False

    @property
    def is_merged(self) -> bool:
        """Never: without a slot it has nothing to merge."""
        return False

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The parameter; at rest, within a forward, what the layer multiplies by."""
        kind = LowRankLinear if self.awake else RestingLinear
        weight: Tensor = kind.weight.fget(self)  # type: ignore[attr-defined]
        return weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Refuse the plain tensor that a replica is given for its weight."""
        RestingLinear.weight.fset(self, value)  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., m] for x [..., n]."""
        return LowRankLinear.forward(self, x) if self.awake else super().forward(x)

    def deactivate(self, keep: bool = False) -> None:
        """Free what the slot holds; the weight stays where it is."""
        LowRankLinear.deactivate(self, keep)

    @torch.no_grad()
    def wake(self) -> None:
        """Bring the weight to the device in its own dtype, and give up the codes; it is there once copies are."""
        if self.awake:
            return
        master = self._whole()
        there = master.device == self.device and master.is_contiguous()
        # What is mapped from a file is not written to.
        if not there or self.home is not None:
            assert self.copies is not None
            self._master, self.stored_weight.data = master, self.copies.bring(master, self.device)
        self.codes, self.scales = self.codes.new_empty(0), self.scales.new_empty(0)
        self.awake = True

    @torch.no_grad()
    def rest(self) -> None:
        """Take the weight back to its master, and let it rest anew; the master is whole once copies are."""
        if self.awake:
            weight = self.stored_weight.detach()
            master = self._written(weight)
            self.codes_home.put(self, self._at_rest(weight), 0)
            self._leave(master)

    @torch.no_grad()
    def go_home(self) -> None:
        """Take the weight back to its master, as `rest` does; the layer computes no more."""
        if self.awake:
            self._leave(self._written(self.stored_weight.detach()))

    def _written(self, weight: Tensor) -> Tensor:
        """Return the master with what the weight has learnt."""
        if self.home is not None:
            return self.home.write(part for _, part in self._tiles(weight))
        if self._master is None:
            return weight
        assert self.copies is not None
        self.copies.send(weight, self._master, room=self._bytes_at_rest())
        return self._master

    def _bytes_at_rest(self) -> int:
        return bytes_at_rest(self.out_features * self.in_features, self.kind)

    def _leave(self, master: Tensor) -> None:
        self.stored_weight.data, self.stored_weight.grad = master, None
        self._master, self.awake = None, False

    def take_master(self, weight: Tensor) -> None:
        """Have another weight for a master, or in the place of its copy that trains."""
        if self.awake:
            self.stored_weight.data.copy_(weight)
        else:
            super().take_master(weight)

    def load_master(self, state_dict: dict[str, Any], key: str) -> bool:
        """Take the master from there if it lives in a file; one that is awake is loaded as any weight."""
        return not self.awake and super().load_master(state_dict, key)

    @torch.no_grad()
    def rest_anew(self) -> None:
        """Take the master as it is now; one that is awake has no codes."""
        if not self.awake:
            super().rest_anew()

    def hold_master(self) -> None:
        """Give a master without values the memory that it takes in host memory, where it trains in its place."""
        super().hold_master()
        self._master = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Leave the master where it is when the model moves; its copy on the device goes along."""
        if not self.awake:
            return super()._apply(fn, recurse)
        master = self.stored_weight.data if self._master is None else self._master
        nn.Module._apply(self, fn, recurse)
        here = self.stored_weight.data
        there = here.device == master.device and here.data_ptr() == master.data_ptr()
        self._master = None if there else master
        if self._master is not None and self.home is None and self.copies is not None:
            self._master = self.copies.in_memory(self._master, here.device)
        return self
