"""Attention by segments against its definition, segment by segment, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops.segment_attention import reference, segment_attention

SCALE = 0.3
# Of the largest value: sums of 16 products and of at most 40 tokens, and in bfloat16 two roundings of 2⁻⁹.
CLOSE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def tensors(dtype: torch.dtype, heads: int = 6, shared: int = 3, tokens: int = 70) -> list[Tensor]:
    """Return query, key and value as a model's views of [1, heads, tokens, width], and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(1, count, tokens, 16, generator=generator, dtype=torch.float64).to(dtype)[0].transpose(0, 1)
        for count in (heads, heads // shared, heads // shared, heads)
    ]
    return [tensor.requires_grad_() for tensor in made[:3]] + made[3:]


def borders(*ends: int) -> Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shared", [1, 3], ids=["own-keys", "shared-keys"])
def test_result_and_gradients_are_those_of_the_definition(dtype: torch.dtype, shared: int) -> None:
    """Segments of one token, of two and of dozens, the last one of all and those between."""
    *given, gradient = tensors(dtype, shared=shared)
    ends = borders(1, 3, 40, 70)
    found = segment_attention(*given, ends, SCALE)
    wanted = reference.segment_attention(*given, ends, SCALE)
    pairs = [(found, wanted), *zip(*(torch.autograd.grad(out, given, gradient) for out in (found, wanted)))]
    for one, other in pairs:
        assert (one - other).abs().max() <= CLOSE[dtype] * other.abs().max()


def test_a_border_in_another_place_is_another_result() -> None:
    """Negative control: what lies behind a border moved by one token differs by far more than roundings."""
    *given, _ = tensors(torch.float32)
    found, moved = (segment_attention(*given, borders(end, 70), SCALE) for end in (40, 41))
    assert torch.equal(found[:40], moved[:40])
    assert (found[41:] - moved[41:]).abs().max() > 0.01


def test_the_operation_is_one_to_torch() -> None:
    """Schema, shapes without values and autograd agree with what it does."""
    *given, _ = tensors(torch.float32, tokens=9)
    torch.library.opcheck(
        torch.ops.lisa_kernels.segment_attention.default, (*given, borders(4, 9), SCALE),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"key": lambda k: k[:-1]}, "one number of tokens"),
        ({"key": lambda k: k[..., :-1], "value": lambda v: v[..., :-1]}, "one width"),
        ({"key": lambda k: k[:, :0], "value": lambda v: v[:, :0]}, "0 heads of keys"),
        ({"borders": lambda b: b.long()}, "int32"),
        ({"borders": lambda b: b[:-1]}, "do not increase from 0 to 70"),
        ({"borders": lambda b: b[1:]}, "do not increase from 0 to 70"),
        ({"borders": lambda b: b[[0, 2, 1, 3]]}, "do not increase from 0 to 70"),
    ],
    ids=["tokens", "widths", "heads", "dtype", "end", "beginning", "order"],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], said: str) -> None:
    query, key, value, _ = tensors(torch.float32)
    given = {"query": query, "key": key, "value": value, "borders": borders(10, 30, 70)}
    given |= {name: make(given[name]) for name, make in change.items()}  # type: ignore[operator]
    with pytest.raises(InputError, match=said):
        segment_attention(**given, scale=SCALE)  # type: ignore[arg-type]
