"""What stands in for values and devices in a rehearsal, whose tensors have neither: torch's meta device, and fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lisa_kernels.ops.linear_cross_entropy  # noqa: F401  (defines an operation that is answered here)
from lisa_kernels.distributed import is_sharded

META = torch.device("meta")
ATTENTION = torch.nn.functional.scaled_dot_product_attention
FUSED_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
READ_VALUE = torch.ops.aten._local_scalar_dense.default
COUNTED_ROWS = torch.ops.lisa_kernels.counted_rows.default


class FusedAttention(TorchFunctionMode):
    """Has attention of tensors without values use a fused kernel, as GPUs and CPUs do.

    torch takes its plain products for them, which form a matrix of all pairs of tokens. The operation is the one for
    CPUs; those for GPUs make tensors of the same sizes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or the fused kernel in the place of attention."""
        if func is ATTENTION and args[0].is_meta:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:
        # As torch does before it calls any kernel.
        mask = torch.where(mask, 0.0, -torch.inf).to(query.dtype)
    output: Tensor = FUSED_ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
    return output


class _Shape(NamedTuple):
    """A fresh tensor that an operation returns."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=META)


class EmptyOperations:
    """Runs operations on tensors without values, each shape once: torch's own way takes half a millisecond each.

    An operation that neither changes nor returns what it was given is a function of shapes here; its results are made
    anew from the shapes that it returned the first time. Questions of the host are answered with `one_sequence`, or
    for rows that hold several with no, and of a batch's labels as many count as it is told.
    """

    def __init__(self, counted_labels: int, one_sequence: bool = True) -> None:
        self.counted_labels, self.one_sequence = counted_labels, one_sequence
        self._pure: dict[Any, bool] = {}
        self._known: dict[Any, _Shape | tuple[_Shape, ...] | None] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what `func` returns."""
        if func is READ_VALUE and args[0].is_meta:
            return one_sequence(*args) if self.one_sequence else False
        if func is COUNTED_ROWS:
            return torch.empty(self.counted_labels, dtype=torch.int64, device=META)
        pure = self._pure.get(func)
        if pure is None:
            pure = self._pure[func] = _is_pure(func)
        if not pure:
            return func(*args, **kwargs)
        key = func, shape_key(args), shape_key(kwargs) if kwargs else ()
        if key not in self._known:
            result = func(*args, **kwargs)
            self._known[key] = _shapes(result, [*tensors_in(args), *tensors_in(kwargs)])
            return result
        known = self._known[key]
        if known is None:
            return func(*args, **kwargs)
        return known.make() if isinstance(known, _Shape) else tuple(shape.make() for shape in known)


class Answers(TorchDispatchMode):
    """Answers what the host asks of tensors without values, and runs the operations on them fast."""

    def __init__(self) -> None:
        super().__init__()
        self._call = EmptyOperations(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return what `func` returns."""
        return self._call(func, args, kwargs or {})


def one_sequence(question: Tensor) -> bool | int:
    """Answer what the host asks of a device: whether each row of a batch holds a single sequence."""
    return True if question.dtype == torch.bool else 1


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among an operation's arguments or results: tuples, lists and mappings of them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, Mapping):
        yield from tensors_in(list(values.values()))


def _is_pure(func: Any) -> bool:
    schema = func._schema
    return not schema.is_mutable and not any(value.alias_info for value in (*schema.arguments, *schema.returns))


def shape_key(value: Any) -> Any:
    """Return what decides, of an operation's argument, the shapes of the results."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta, type(value)
    if isinstance(value, (tuple, list)):
        return tuple([shape_key(item) for item in value])
    if isinstance(value, dict):
        return tuple([(name, shape_key(item)) for name, item in value.items()])
    return type(value), value


def _shapes(result: Any, given: Sequence[Tensor]) -> _Shape | tuple[_Shape, ...] | None:
    """Return the shapes of an operation's results; None where they are not fresh and dense tensors on their own."""
    if isinstance(result, tuple):
        shapes = [_shapes(part, given) for part in result]
        return tuple(shape for shape in shapes if isinstance(shape, _Shape)) if all(shapes) else None
    if not isinstance(result, Tensor) or not result.is_meta or is_sharded(result):
        return None
    storage, shape = result.untyped_storage(), _Shape(result.shape, result.stride(), result.dtype)
    if any(tensor.untyped_storage()._cdata == storage._cdata for tensor in given):
        return None
    return shape if shape.make().untyped_storage().nbytes() == storage.nbytes() else None
