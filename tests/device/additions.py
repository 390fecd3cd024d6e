"""Operations that have no order of their own on a GPU: here each call has another, drawn from a seed.

They are those of a model that the documentation of `torch.use_deterministic_algorithms` names: where an index names a
place several times, atomics add there, or write, in whatever order threads come to it. The CPU takes them in the order
of the index, which is shuffled together with what belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_draws = torch.Generator()


def seed_draws(seed: int) -> None:
    """Begin the orders of a seed."""
    _draws.manual_seed(seed)


def drawn_order(count: int) -> Tensor:
    """Return the numbers below `count` in the next order."""
    return torch.randperm(count, generator=_draws)


def _shuffled(dim: int, *tensors: Tensor) -> list[Tensor]:
    """Return tensors of one length along `dim`, all in the next order."""
    order = drawn_order(tensors[0].shape[dim])
    return [tensor.index_select(dim, order) for tensor in tensors]


def _index_add(target: Tensor, dim: int, index: Tensor, source: Tensor) -> tuple[Any, ...]:
    if index.dim() == 0 or source.dim() == 0:
        return target, dim, index, source
    order = drawn_order(len(index))
    return target, dim, index[order], source.index_select(dim, order)


def _scatter(target: Tensor, dim: int, index: Tensor, source: Any) -> tuple[Any, ...]:
    if index.dim() == 0 or not isinstance(source, Tensor):
        return target, dim, index, source
    # A source may be larger than the index, which then takes its first part.
    return target, dim, *_shuffled(dim, index, source[tuple(map(slice, index.shape))])


def _put(target: Tensor, index: Tensor, source: Tensor) -> tuple[Any, ...]:
    return target, *_shuffled(0, index.reshape(-1), source.reshape(-1))


def _embedding(dy: Tensor, ids: Tensor) -> tuple[Any, ...]:
    return tuple(_shuffled(0, dy.reshape(-1, dy.shape[-1]), ids.reshape(-1)))


# By name, without what tells an operation in place: how many arguments are shuffled, and by what.
_UNORDERED: dict[str, tuple[int, Callable[..., tuple[Any, ...]]]] = {
    "aten::index_add": (4, _index_add),
    "aten::index_copy": (4, _index_add),
    "aten::scatter": (4, _scatter),
    "aten::scatter_add": (4, _scatter),
    "aten::scatter_reduce": (4, _scatter),
    "aten::put": (3, _put),
    "aten::embedding_dense_backward": (2, _embedding),
}


def unordered(func: Any) -> Callable[..., Any] | None:
    """Return an operation that works in an order drawn at each call, or None for one whose order a GPU keeps, too."""
    if torch.are_deterministic_algorithms_enabled():
        return None
    count, shuffle = _UNORDERED.get(func._schema.name.removesuffix("_"), (0, None))
    if shuffle is None:
        return None

    def compute(*given: Any, **named: Any) -> Any:
        return func(*shuffle(*given[:count]), *given[count:], **named)

    return compute
