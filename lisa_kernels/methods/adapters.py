"""The adapters of LoRA and LoRA-FA beside training: what they hold, merged into the weights and taken out again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lisa_kernels.distributed import at_rest, local
from lisa_kernels.layers import AccumulatingSlot, SlotModule
from lisa_kernels.methods.adapter_layout import new_head
from lisa_kernels.methods.definitions import AdapterMethod


@dataclass
class Adapters:
    """The adapters of one attached model: what stays beside the weights of the training.

    While they are merged, each layer's slot lies in `aside` with a copy of the weight in host memory.
    """

    model: nn.Module
    method: AdapterMethod
    layers: Mapping[str, SlotModule]
    aside: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def merged(self) -> bool:
        """Whether the weights hold the adapters now."""
        return bool(self.aside)

    def slot(self, path: str) -> Tensor:
        """Return one layer's B, float32 [r, m], merged or not."""
        return self.aside[path][1] if self.merged else self.layers[path].slot.detach()

    def head(self) -> dict[str, Tensor]:
        """Return the tensors of a new head, which trains in full, by their names in the model."""
        children = new_head(self.model).items()
        return {f"{name}.{key}": value for name, child in children for key, value in child.state_dict().items()}

    def merge(self) -> None:
        """W ← W + scale · Bᵀ A; the layers are then plain linears, those that rest with codes of the sum."""
        if self.merged:
            return
        at_rest(self.model)
        self.aside = {path: (_held(layer), layer.slot.detach().clone()) for path, layer in self.layers.items()}
        self._add_to_weights()
        for layer in self.layers.values():
            layer.slot.data = torch.empty(0, device=layer.slot.device)
            _rest_anew(layer)

    def merge_for_good(self) -> None:
        """Leave the adapters in the weights; a copy from `merge` is freed."""
        if not self.merged:
            at_rest(self.model)
            self._add_to_weights()
        self.aside = {}

    def unmerge(self) -> None:
        """Put weights and slots back bit for bit."""
        at_rest(self.model)
        for path, (weight, slot) in self.aside.items():
            layer = self.layers[path]
            if isinstance(layer, AccumulatingSlot):
                layer.take_master(weight)
            else:
                local(layer.stored_weight).copy_(weight)
            layer.slot.data = slot
        self.aside = {}

    def _add_to_weights(self) -> None:
        for layer in self.layers.values():
            if isinstance(layer, AccumulatingSlot):
                layer.merge()
            else:
                layer.add_slot_(layer.stored_weight.data)


def _held(layer: SlotModule) -> Tensor:
    """Return a layer's weight as it is, in host memory, or in the file that another will take the place of."""
    if isinstance(layer, AccumulatingSlot) and layer.home is not None:
        return layer.stored_weight.detach()
    return local(layer.stored_weight).to("cpu", copy=True)


def _rest_anew(layer: SlotModule) -> None:
    if isinstance(layer, AccumulatingSlot):
        layer.rest_anew()
