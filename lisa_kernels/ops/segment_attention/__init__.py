"""Causal attention among the tokens of each segment of one long row: contract, checks, autograd, `torch.library`.

Nothing of the size of all pairs of tokens exists, neither scores nor a mask. Saved for the backward are queries, keys,
values, the result and one float32 per token and head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops.segment_attention import fused

__all__ = ["segment_attention"]

Three = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("lisa_kernels::segment_attention", mutates_args=())
def _segment_attention(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return fused.forward(query, key, value, borders, scale)


@_segment_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), fused.empty_sums(query)


@torch.library.custom_op("lisa_kernels::segment_attention_backward", mutates_args=())
def _segment_attention_backward(
    dresult: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, sums: Tensor, borders: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return fused.backward(dresult, query, key, value, result, sums, borders, scale)


@_segment_attention_backward.register_fake
def _(
    dresult: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, sums: Tensor, borders: Tensor,
    scale: float,
) -> Three:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, borders, scale = inputs
    ctx.save_for_backward(query, key, value, *output, borders)
    ctx.scale = scale
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dresult: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, result, sums, borders = ctx.saved_tensors
    return (*_segment_attention_backward(dresult, query, key, value, result, sums, borders, ctx.scale), None, None)


_segment_attention.register_autograd(_backward, setup_context=_setup_context)


def segment_attention(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scale: float) -> Tensor:
    """Return softmax(scale · Q Kᵀ) V [T, H, d], each token attending to itself and those before it in its segment.

    query: [T, H, d]; key, value: [T, K, d] with H a multiple of K, head h of the query reading head h // (H / K); all
    of one float dtype, on GPUs a 16-bit one. borders: int32 [segments + 1], increasing from 0 to T: segment i holds
    tokens borders[i] up to borders[i + 1]. Raises InputError for what does not fit; on a GPU what borders hold is not
    looked at, for the host would wait.
    """
    if query.dim() != 3 or key.shape != value.shape or query.shape[::2] != key.shape[::2]:
        raise InputError(
            f"query is {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)}; [tokens, heads, "
            "width] with one number of tokens and one width are wanted."
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise InputError(f"{query.shape[1]} heads of queries do not share {key.shape[1]} heads of keys evenly.")
    if borders.dim() != 1 or borders.dtype != torch.int32:
        raise InputError(f"borders are {borders.dtype} {list(borders.shape)}; int32 [segments + 1] is wanted.")
    result: Tensor = _segment_attention(query, key, value, borders, scale)[0]
    return result
