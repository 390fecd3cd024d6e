"""Attention that reuses the map of the layer before."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lisa_kernels.flow import Intervals
from lisa_kernels.flow.residual_attention import ContextKeys, HeadGates, attend
from lisa_kernels.flow.transformer import FlowTransformer

from .test_transformer import inputs, shape, woken

HEADS, TOKENS, WIDTH = 4, 6, 8


def heads(number: int, count: int = HEADS, tokens: int = TOKENS) -> Tensor:
    return torch.randn(2, count, tokens, WIDTH, generator=torch.Generator().manual_seed(number))


def test_without_reuse_it_is_torch_s_attention() -> None:
    """Over context and image together, with heads that share keys, and with padding that nothing sees."""
    query, key, value = heads(1), heads(2, 2), heads(3, 2)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    context = ContextKeys(heads(4, 2, 5), heads(5, 2, 5), mask)
    found, image_map = attend(query, key, value, context=context)
    keys, values = (torch.cat(pair, dim=2) for pair in ((context.key, key), (context.value, value)))
    seen = torch.cat([mask, torch.ones(2, TOKENS, dtype=torch.bool)], dim=1)[:, None, None]
    wanted = scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(found, wanted)
    assert image_map is None


@pytest.mark.parametrize("reuse", ["before", "after"])
def test_the_image_block_takes_the_map_of_the_layer_before(reuse: str) -> None:
    """Against the formula, one gate per head; the context's part is left alone."""
    query, key, value = heads(1), heads(2), heads(3)
    context = ContextKeys(heads(4, tokens=5), heads(5, tokens=5))
    before = torch.randn(2, HEADS, TOKENS, TOKENS)
    gates = torch.randn(2, HEADS, 1, 1)
    found, image_map = attend(query, key, value, context=context, previous=before, gates=gates, reuse=reuse)
    scores = query @ torch.cat([context.key, key], dim=2).mT / math.sqrt(WIDTH)
    added = torch.cat([torch.zeros(2, HEADS, TOKENS, 5), gates * before], dim=-1)
    weights = (scores + added).softmax(-1) if reuse == "before" else scores.softmax(-1) + added
    torch.testing.assert_close(found, weights @ torch.cat([context.value, value], dim=2))
    used = (scores + added if reuse == "before" else weights)[..., 5:]
    torch.testing.assert_close(image_map, used)


@pytest.mark.parametrize("reuse", ["before", "after"])
def test_a_gate_of_zero_is_no_reuse_at_all(reuse: str) -> None:
    """Bit for bit, through a whole model; a gate that is open moves it."""
    torch.manual_seed(0)
    plain = woken(FlowTransformer(shape(), Intervals.make(2))).eval()
    reusing = FlowTransformer(shape(reuse=reuse), Intervals.make(2)).eval()
    reusing.load_state_dict(plain.state_dict(), strict=False)
    x, labels = inputs()
    times = torch.full((3,), 0.2)
    assert torch.equal(reusing(x, times, labels), plain(x, times, labels))
    for part in reusing.modules():
        if isinstance(part, HeadGates):
            torch.nn.init.ones_(part.linear.bias)
    assert not torch.equal(reusing(x, times, labels), plain(x, times, labels))


def test_the_first_layer_of_a_group_reuses_nothing() -> None:
    """It has no gate, and is given no map of the group before."""
    model = FlowTransformer(shape(reuse="before"), Intervals.make(4))
    assert [block.gates is None for block in model.blocks] == [True, False] * 4
    given = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: given.append(args[2]))
    x, labels = inputs()
    model.eval()(x, torch.full((3,), 0.3), labels)
    assert [previous is None for previous in given] == [True, False]


def test_a_gate_trains_from_zero() -> None:
    """Its gradient is not zero where the map of the layer before says something."""
    torch.manual_seed(0)
    gates = HeadGates(16, HEADS)
    opened = gates(torch.randn(2, 16))
    assert not opened.any()
    found, _ = attend(
        heads(1), heads(2), heads(3), previous=torch.randn(2, HEADS, TOKENS, TOKENS), gates=opened, reuse="before"
    )
    found.square().sum().backward()
    assert gates.linear.weight.grad is not None
    assert gates.linear.weight.grad.abs().min() > 0
