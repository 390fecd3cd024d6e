"""Products that are fast where torch's are not, for the linear layers that carry no slot."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lisa_kernels.layers.linears import is_linear, plain_forward
from lisa_kernels.ops.lowrank_linear.products import HALVES, has_matrix_units


class PlainLinears:
    """Gives a model's frozen and fully trained linears, and its head, 16-bit products that a CPU can bear.

    Only on CPUs without 16-bit matrix units, where one backward through torch's own takes minutes; the layers stay the
    modules that they are. Products of float32 remain torch's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[nn.Module] = []
        if all(map(has_matrix_units, HALVES)):
            return
        for layer in model.modules():
            if not is_linear(layer) or "forward" in vars(layer):
                continue
            if isinstance(layer.weight, Tensor) and layer.weight.device == torch.device("cpu"):
                layer.forward = plain_forward(layer)
                self._layers.append(layer)

    def remove(self) -> None:
        """Give the layers their own forward back."""
        for layer in self._layers:
            del layer.forward
        self._layers = []
