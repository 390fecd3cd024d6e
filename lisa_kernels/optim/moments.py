"""Moments of parameters read as float32 and written as a step stores them, in whichever form a state has them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lisa_kernels.ops.blockwise8 import dequantize_blockwise, quantize_blockwise


def read_moments(state: Mapping[str, Tensor], shape: torch.Size, block_size: int) -> tuple[Tensor, Tensor]:
    """Return (m, v) float32 of `shape`: those of the state itself where it has them in float32."""
    if "m" in state:
        return state["m"].view(shape), state["v"].view(shape)
    m = dequantize_blockwise(state["m_codes"], state["m_absmax"], "m", block_size)
    v = dequantize_blockwise(state["v_codes"], state["v_absmax"], "v", block_size)
    return m.view(shape), v.view(shape)


def write_moments(
    state: Mapping[str, Tensor], m: Tensor, v: Tensor, block_size: int, key: Tensor | None = None,
    chosen: Tensor | None = None,
) -> None:  # fmt: skip
    """Replace the moments of a state, quantised where it has codes, with random numbers of `key` if there is one.

    chosen: bool 0-d on the device; where it is false the state stays as it is, to the bit.
    """
    for name, moment in (("m", m), ("v", v)):
        flat = moment.reshape(-1)
        if name in state:
            _put(state[name], flat, chosen)
            continue
        codes, absmax = quantize_blockwise(flat.contiguous(), name, block_size, key)
        _put(state[f"{name}_codes"], codes, chosen)
        _put(state[f"{name}_absmax"], absmax, chosen)


def _put(target: Tensor, values: Tensor, chosen: Tensor | None) -> None:
    if chosen is None:
        target.copy_(values)
    else:
        torch.where(chosen, values, target, out=target)
