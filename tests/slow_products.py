"""Whether torch's own 16-bit products are used on a CPU, where they are slow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def have_no_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the tiled path on every CPU."""
    for module in ("lisa_kernels.ops.lowrank_linear.products", "lisa_kernels.layers.plain_linears"):
        monkeypatch.setattr(f"{module}.has_matrix_units", lambda dtype: False)


class HalfProducts(TorchDispatchMode):
    """Counts torch's own matrix products of 16-bit operands: the slow ones."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear):
            self.count += any(isinstance(each, torch.Tensor) and each.dtype == torch.bfloat16 for each in args)
        return func(*args, **(kwargs or {}))
