"""One layer of a flow transformer against its formula."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from lisa_kernels.flow.block import FlowBlock

WIDTH, HEADS = 32, 4


def block() -> FlowBlock:
    torch.manual_seed(0)
    made = FlowBlock.fresh(WIDTH, HEADS)
    for norm in (made.attention_norm, made.network_norm, made.output_norm):
        torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(made.modulation.weight, std=0.1)
    torch.nn.init.normal_(made.modulation.bias)
    return made


def test_a_layer_is_norm_attention_scale_then_norm_modulation_network_norm_scale() -> None:
    made = block()
    x, embedding = torch.randn(2, 5, WIDTH), torch.randn(2, WIDTH)
    after, scale, shift, last = made.modulation(silu(embedding))[:, None].chunk(4, dim=-1)
    attention, normed = made.attention, made.attention_norm(x)
    query, key, value = (
        part(normed).reshape(2, 5, HEADS, -1).transpose(1, 2)
        for part in (attention.query, attention.key, attention.value)
    )
    attended = attention.output(scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(2, 5, WIDTH))
    middle = x + attended * (1 + after)
    wanted = middle + made.output_norm(made.network(made.network_norm(middle) * (1 + scale) + shift)) * (1 + last)
    found, image_map = made(x, embedding)
    torch.testing.assert_close(found, wanted)
    assert image_map is None


def test_a_new_layer_is_moved_by_nothing_but_its_input() -> None:
    """Its modulation begins as none."""
    made, x = FlowBlock.fresh(WIDTH, HEADS), torch.randn(2, 5, WIDTH)
    assert torch.equal(made(x, torch.randn(2, WIDTH))[0], made(x, torch.randn(2, WIDTH))[0])


def test_queries_and_keys_turn_before_they_meet() -> None:
    """And values do not."""
    made, x, embedding = block(), torch.randn(2, 5, WIDTH), torch.randn(2, WIDTH)
    turned = []

    def rotate(tensor: torch.Tensor) -> torch.Tensor:
        turned.append(tensor.shape)
        return -tensor

    # Both turned round, their product is as it was.
    torch.testing.assert_close(made(x, embedding, rotate=rotate)[0], made(x, embedding)[0])
    assert turned == [(2, HEADS, 5, WIDTH // HEADS)] * 2
