"""Shapes in the place of values: the same as torch's own, and remembered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_kernels.ops.linear_cross_entropy import linear_cross_entropy
from lisa_kernels.ops.linear_cross_entropy.reference import Head
from lisa_kernels.plan.stand_ins import META, EmptyOperations, FusedAttention

aten = torch.ops.aten


class Listening(TorchDispatchMode):
    """Runs every operation through `call` and notes its name."""

    def __init__(self, call: EmptyOperations) -> None:
        super().__init__()
        self.call, self.names = call, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return self.call(func, args, kwargs or {})


def anatomy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.untyped_storage().nbytes()
    return tuple(anatomy(part) for part in value)


@pytest.mark.parametrize(
    ("func", "arguments"),
    [
        (aten.mul.Tensor, ((4, 6), (4, 1))),
        (aten.add.Tensor, ((3, 4, 5), (5,))),
        (aten.mm.default, ((4, 6), (6, 2))),
        (aten.cat.default, ([(2, 3), (4, 3)],)),
        (aten.linalg_cholesky_ex.default, ((5, 5),)),
        (aten.sort.default, ((7,),)),
        (aten.split.Tensor, ((7, 2), 3)),
        (aten.view.default, ((4, 6), [24])),
        (aten.t.default, ((4, 6),)),
    ],
    ids=lambda value: str(value) if callable(value) else "",
)
def test_what_is_remembered_is_what_torch_returns(func: Any, arguments: Any) -> None:
    """Shapes, strides, dtypes and bytes, the first time and the second; transposed inputs are another question."""
    call = EmptyOperations(0)

    def made(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return torch.empty(argument, device=META)
        return [made(part) for part in argument] if isinstance(argument, list) else argument

    given = tuple(made(argument) for argument in arguments)
    for _ in range(2):
        assert anatomy(call(func, given, {})) == anatomy(func(*given))
    if func is aten.mul.Tensor:
        turned = tuple(tensor.t() for tensor in given)
        assert anatomy(call(func, turned, {})) == anatomy(func(*turned))


def test_numbers_of_other_types_are_other_questions() -> None:
    """1, 1.0 and True are equal to Python, and not to torch's rules of promotion."""
    call, whole = EmptyOperations(0), torch.empty(3, dtype=torch.int64, device=META)
    dtypes = [call(aten.mul.Tensor, (whole, factor), {}).dtype for factor in (1, 1.0, True, 1.0)]
    assert dtypes == [torch.int64, torch.float32, torch.int64, torch.float32]


def test_views_stay_views_and_fresh_tensors_fresh() -> None:
    """What shares storage shares it each time; what does not is not handed out twice."""
    call, x = EmptyOperations(0), torch.empty(4, 6, device=META)
    for _ in range(2):
        assert call(aten._unsafe_view.default, (x, [24]), {}).untyped_storage()._cdata == x.untyped_storage()._cdata
    first, second = (call(aten.exp.default, (x,), {}) for _ in range(2))
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_attention_forms_no_matrix_of_all_pairs() -> None:
    """Fused with grouped heads and with a mask; torch's own choice is not (negative control)."""
    q = torch.empty(2, 4, 64, 8, device=META, requires_grad=True)
    k = torch.empty(2, 2, 64, 8, device=META, requires_grad=True)
    mask = torch.empty(2, 1, 64, 64, dtype=torch.bool, device=META)
    attention = torch.nn.functional.scaled_dot_product_attention
    with Listening(EmptyOperations(0)) as heard, FusedAttention():
        one = attention(q, k, k, is_causal=True, enable_gqa=True)
        other = attention(q, q, q, attn_mask=mask)
        assert one.shape == other.shape == q.shape
    assert sum("flash_attention" in name for name in heard.names) == 2
    assert not any("bmm" in name or "softmax" in name for name in heard.names)
    with Listening(EmptyOperations(0)) as heard:
        attention(q, q, q, is_causal=True)
    assert any("softmax" in name for name in heard.names)


def test_attention_with_values_is_left_alone() -> None:
    """Only tensors without values need another kernel."""
    q = torch.randn(1, 2, 5, 8)
    with FusedAttention():
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert torch.equal(y, torch.nn.functional.scaled_dot_product_attention(q, q, q))


def test_the_host_reads_that_there_is_one_sequence_and_as_many_labels_as_told() -> None:
    """A model asks whether rows are packed; the loss asks which labels count."""
    labels = torch.empty(12, dtype=torch.int64, device=META)
    hidden, weight = torch.empty(12, 8, device=META), torch.empty(20, 8, device=META)
    with Listening(EmptyOperations(9)) as heard:
        assert bool((labels == 0).all())
        # What has a value is read as it is (negative control).
        assert torch.full((), 7.0).item() == 7.0
        assert linear_cross_entropy(hidden, Head(weight), labels).shape == ()
    assert "aten.index_select.default" in heard.names
