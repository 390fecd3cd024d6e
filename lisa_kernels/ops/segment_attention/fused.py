"""Attention among the tokens of each segment by torch's fused kernels: on CPUs a call a segment, on GPUs one in all."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lisa_kernels.errors import InputError

_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ON_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_ON_GPU, _ON_GPU_BACKWARD = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward


def forward(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the result [T, H, d] and the logarithms of the softmax's sums [H, T]."""
    if query.is_cuda:
        tokens = len(query)
        return _ON_GPU(query, key, value, borders, borders, tokens, tokens, 0.0, True, False, scale=scale)[:2]  # type: ignore[no-any-return]
    result = query.new_empty(query.shape)
    sums = empty_sums(query)
    for span in _spans(borders, len(query)):
        part, logarithms = _ON_CPU(*(_alone(tensor[span]) for tensor in (query, key, value)), 0.0, True, scale=scale)
        result[span], sums[:, span] = _together(part), logarithms[0]
    return result, sums


def backward(
    dresult: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, sums: Tensor, borders: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key and value."""
    if query.is_cuda:
        tokens, nothing = len(query), torch.zeros(2, dtype=torch.uint64, device=query.device)
        # Dropout is off, so the state of the random numbers is not read.
        return _ON_GPU_BACKWARD(  # type: ignore[no-any-return]
            dresult.contiguous(), query, key, value, result, sums, borders, borders, tokens, tokens, 0.0, True,
            nothing, nothing, scale=scale,
        )  # fmt: skip
    gradients = tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    for span in _spans(borders, len(query)):
        given = [_alone(tensor[span]) for tensor in (dresult, query, key, value, result)]
        # In the layout in which the forward gave them.
        logarithms = sums[:, span].t().contiguous().t()[None]
        parts = _ON_CPU_BACKWARD(*given, logarithms, 0.0, True, scale=scale)
        for gradient, part in zip(gradients, parts):
            gradient[span] = _together(part)
    return gradients  # type: ignore[return-value]


def empty_sums(query: Tensor) -> Tensor:
    """Return room for the logarithms, one per head and token, of float32 or float64."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((query.shape[1], len(query)), dtype=dtype)


def _alone(part: Tensor) -> Tensor:
    """Return a segment [t, heads, d] as a batch of one, [1, heads, t, d]."""
    return part.transpose(0, 1)[None]


def _together(part: Tensor) -> Tensor:
    return part[0].transpose(0, 1)


def _spans(borders: Tensor, tokens: int) -> Iterator[slice]:
    ends: list[int] = borders.tolist()
    if ends[:1] != [0] or ends[-1] != tokens or any(end <= start for start, end in pairwise(ends)):
        raise InputError(f"borders {ends} do not increase from 0 to {tokens}, the number of tokens.")
    return (slice(start, end) for start, end in pairwise(ends))
