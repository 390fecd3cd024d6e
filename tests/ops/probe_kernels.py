"""A Triton kernel that applies one of the package's functions to numbers, to see all that it may meet."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from lisa_kernels.ops.tiles import Launch

triton = pytest.importorskip("triton", reason="Triton is not installed: it is for Linux only")
tl = pytest.importorskip("triton.language", reason="Triton is not installed: it is for Linux only")

BLOCK = 1024


def apply_launch(function: Any, values: Tensor, results: Tensor) -> Launch:
    """Return the launch that writes `function` of float32 values, whole blocks of them."""

    @triton.jit
    def apply(values, results, BLOCK: tl.constexpr):
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(results + place, function(tl.load(values + place)))

    return Launch(apply, {"values": values, "results": results}, {"BLOCK": BLOCK}, values.numel() // BLOCK, 4)
