"""What the operations of a rehearsed step do: products, bytes read and written, launches, by part of the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

import lisa_kernels.ops.fold
import lisa_kernels.ops.lowrank_linear
import lisa_kernels.ops.project
import lisa_kernels.ops.segment_attention  # noqa: F401  (all define operations that are named here)
from lisa_kernels.plan.stand_ins import FUSED_ATTENTION, META, shape_key, tensors_in

if TYPE_CHECKING:
    from lisa_kernels.plan.ranks import Travel
    from lisa_kernels.plan.streaming import Turns

PARTS = ("forward", "recomputation", "backward", "optimizer", "switch")
ATTENTION = FUSED_ATTENTION.default
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
FOLD, PROJECT = torch.ops.lisa_kernels.fold_.default, torch.ops.lisa_kernels.project.default
SEGMENTS = torch.ops.lisa_kernels.segment_attention.default
SEGMENTS_BACKWARD = torch.ops.lisa_kernels.segment_attention_backward.default
# Not taken apart into `mm` where they run below autograd.
WHOLE_PRODUCTS = frozenset({torch.ops.aten.linear, torch.ops.aten.matmul})
LOWRANK = torch.ops.lisa_kernels.lowrank_linear.default
LOWRANK_BACKWARD = torch.ops.lisa_kernels.lowrank_linear_backward.default
LINEAR, LINEAR_BACKWARD = torch.ops.lisa_kernels.linear.default, torch.ops.lisa_kernels.linear_backward.default
# A backward of attention makes the scores anew, and five products in the place of two.
BACKWARD_PRODUCTS = 2.5
# They make a tensor and write nothing.
ALLOCATIONS = frozenset(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
)
# Their first argument is a table of which only the rows that are named are read.
LOOKED_UP = frozenset({torch.ops.aten.embedding, torch.ops.aten.index_select})


@dataclass(frozen=True, slots=True)
class Operation:
    """What one operation takes of a device, whatever the device.

    products: multiplications and additions of matrix products and attention, each counted. bytes: read and written.
    key: function and shapes, by which two operations are the same; example: the function with its arguments, without
    values. halves: whether its matrices have 16 bits.
    """

    key: Any
    example: tuple[Any, tuple[Any, ...], dict[str, Any]]
    products: int
    bytes: int
    halves: bool


class WorkLog:
    """The operations of a rehearsal: how often each one ran, by phase and part.

    Views and allocations are left out, for they do no work. travel: what ranks would send each other, if there are any.
    turns: in which order blocks are read that are streamed from the host.
    """

    travel: Travel | None = None
    turns: Turns | None = None

    def __init__(self) -> None:
        self.operations: dict[Any, Operation | None] = {}
        self.counts: Counter[tuple[str, str, Any]] = Counter()

    def __call__(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, phase: str, part: str
    ) -> None:  # fmt: skip
        """Note one operation; a part without a name is the optimizer's, or a switch's."""
        part = part or ("switch" if phase.endswith("switch") else "optimizer")
        key = func, shape_key(args), shape_key(dict(kwargs)) if kwargs else ()
        if key not in self.operations:
            self.operations[key] = _measure(key, func, args, dict(kwargs), result)
        if self.operations[key] is not None:
            self.counts[phase, part, key] += 1

    def of_phases(self, wanted: Callable[[str], bool]) -> dict[str, Counter[Any]]:
        """Return the operations of those phases: by part, how often each key ran."""
        found: dict[str, Counter[Any]] = {part: Counter() for part in PARTS}
        for (phase, part, key), count in self.counts.items():
            if wanted(phase):
                found[part][key] += count
        return found


def _measure(
    key: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Operation | None:  # fmt: skip
    read, made = [*tensors_in(args), *tensors_in(kwargs)], list(tensors_in(result))
    mutated = list(_mutated(func, args, kwargs))
    if func.overloadpacket in ALLOCATIONS:
        return None
    given = {tensor.untyped_storage()._cdata for tensor in read}
    fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in given]
    if not fresh and not mutated:
        return None
    looked_up = read[:1] if func.overloadpacket in LOOKED_UP else []
    moved = sum(map(_bytes, read[len(looked_up) :])) + sum(map(_bytes, fresh)) + sum(map(_bytes, mutated))
    moved += sum(map(_bytes, fresh[:1])) if looked_up else 0
    halves = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in read)
    example = func, *(_shapes_of(given) for given in (args, kwargs))
    return Operation(key, example, products_of(func, args, kwargs, result), moved, halves)


def _shapes_of(value: Any) -> Any:
    """Return arguments with tensors of their own: those given would live for as long as they are kept as examples."""
    if isinstance(value, Tensor):
        if value.dtype == torch.int32 and value.device.type == "cpu":
            # The borders of segments: what they hold decides how much there is to do.
            return value.clone()
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
    if isinstance(value, (tuple, list)):
        return type(value)(_shapes_of(item) for item in value)
    if isinstance(value, dict):
        return {name: _shapes_of(item) for name, item in value.items()}
    return value


def products_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Return the multiplications and additions of an operation's matrix products; 0 of one that has none."""
    own = _OWN.get(func)
    if own is not None:
        return 2 * own(*args)
    if func is SEGMENTS:
        return _segments(args[0], args[3])
    if func is SEGMENTS_BACKWARD:
        return int(BACKWARD_PRODUCTS * _segments(args[1], args[6]))
    if func is ATTENTION:
        return _attention(args[0], args[1], bool(args[4]) if len(args) > 4 else bool(kwargs.get("is_causal")))
    if func is ATTENTION_BACKWARD:
        return int(BACKWARD_PRODUCTS * _attention(args[1], args[2], bool(args[7])))
    if func.overloadpacket is torch.ops.aten.addmm_:
        return 2 * int(args[1].numel()) * int(args[2].shape[1])
    if func.overloadpacket in WHOLE_PRODUCTS:
        left, right = args[0], args[1]
        columns = right.shape[0] if func.overloadpacket is torch.ops.aten.linear else right.shape[-1]
        return 2 * int(left.numel()) * int(columns)
    formula = flop_registry.get(func.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _lowrank(x: Tensor, weight: Tensor, bias: Any, slot: Tensor, basis: Tensor, scale: float, zero: bool) -> int:
    tokens, (m, n), rank = x.shape[:-1].numel(), weight.shape, basis.shape[0]
    return tokens * (m * n + rank * n + (0 if zero else rank * m))


def _lowrank_backward(
    dy: Tensor, weight: Tensor, projected: Tensor, slot: Tensor | None, basis: Tensor | None, scale: float,
    needs_dx: bool, x: Tensor | None = None,
) -> int:  # fmt: skip
    tokens, (m, n), rank = dy.shape[:-1].numel(), weight.shape, projected.shape[-1]
    # dY Bᵀ is made once for both gradients that need it.
    through = rank * m if slot is not None and (needs_dx or x is not None) else 0
    into_x = m * n + (rank * n if slot is not None else 0) if needs_dx else 0
    return tokens * (rank * m + through + into_x + (rank * n if x is not None else 0))


def _linear_backward(dy: Tensor, weight: Tensor, x: Tensor | None, needs_dx: bool) -> int:
    return dy.shape[:-1].numel() * weight.numel() * (needs_dx + (x is not None))


# Multiplications of the package's own operations, each with an addition.
_OWN: dict[Any, Callable[..., int]] = {
    FOLD: lambda weight, left, *_: left.shape[0] * weight.numel(),
    PROJECT: lambda basis, gradient: basis.shape[0] * gradient.numel(),
    LOWRANK: _lowrank,
    LOWRANK_BACKWARD: _lowrank_backward,
    LINEAR: lambda x, weight, bias: x.numel() * weight.shape[0],
    LINEAR_BACKWARD: _linear_backward,
}


def _attention(query: Tensor, key: Tensor, causal: bool) -> int:
    batch, heads, rows, width = query.shape
    return 4 * batch * heads * rows * key.shape[2] * width // (2 if causal else 1)


def _segments(query: Tensor, borders: Tensor) -> int:
    tokens, heads, width = query.shape
    squares = tokens**2 if borders.is_meta else int(borders.diff().long().square().sum())
    return 2 * heads * width * squares


def _mutated(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        # torch's fused optimizers write gradients only where a scaler is to be undone.
        if argument.alias_info is None or not argument.alias_info.is_write or argument.name == "grads":
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        found += tensors_in(value)
    return found


def _bytes(tensor: Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        # An expanded dimension is read once.
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()
