"""Layers for images that begin as copies of a decoder's layers; the decoder itself stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.flow.block import FlowBlock, ImageAttention, Rotate
from lisa_kernels.flow.context import Context, read_context
from lisa_kernels.layers import find_blocks

# Each part of a layer by the names that decoders of transformers share.
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LAYER = ("input_layernorm", "post_attention_layernorm", "mlp", "self_attn")
# What a copy's output may differ by from its layer's, relative, beside the roundings of a 16-bit decoder.
_ALIKE = 1e-4


def replicate(decoder: Any, reuse: str, group_size: int) -> tuple[list[FlowBlock], nn.Module]:
    """Return (a trainable float32 copy of each layer, the decoder's rotary embedding).

    Raises InputError for layers that are built of other parts, or compute something else from them.
    """
    path, layers = find_blocks(decoder)
    around = decoder.get_submodule(path.rpartition(".")[0])
    rotary = getattr(around, "rotary_emb", None)
    if rotary is None:
        raise InputError(
            f"{type(decoder).__name__} has no rotary embedding of positions (rotary_emb), by which image tokens find "
            "their places; use a decoder such as a Llama, Qwen or SmolLM."
        )
    blocks = [_replica(layer, reuse, first=number % group_size == 0) for number, layer in enumerate(layers)]
    rotary = copy.deepcopy(rotary)
    _check_alike(decoder, list(layers), blocks, rotary)
    return blocks, rotary


def _replica(layer: nn.Module, reuse: str, first: bool) -> FlowBlock:
    lacking = [name for name in _LAYER if not hasattr(layer, name)]
    attention = getattr(layer, "self_attn", layer)
    lacking += [f"self_attn.{name}" for name in _ATTENTION if not isinstance(getattr(attention, name, None), nn.Linear)]
    if lacking:
        raise InputError(
            f"a layer of the backbone ({type(layer).__name__}) has no {', '.join(lacking)}; layers for images are made "
            "of those of a Llama, Qwen or SmolLM."
        )
    query, key, value, output = (copy.deepcopy(getattr(attention, name)) for name in _ATTENTION)
    query_norm, key_norm = (copy.deepcopy(getattr(attention, name, None)) for name in ("q_norm", "k_norm"))
    norm, network_norm, network = (
        copy.deepcopy(getattr(layer, name)) for name in ("input_layernorm", "post_attention_layernorm", "mlp")
    )
    head_width: Any = attention.head_dim
    image = ImageAttention(query, key, value, output, head_width, query_norm, key_norm)
    replica = FlowBlock(image, norm, network, network_norm, query.in_features, query.in_features, reuse, first)
    return replica.float().requires_grad_(True)


def rotation(rotary: nn.Module, positions: Tensor) -> Rotate:
    """Return what turns queries and keys [rows, heads, tokens, head width] at positions, int64 [rows, tokens]."""
    cosine, sine = rotary(torch.empty(0, dtype=torch.float32, device=positions.device), positions)
    return partial(_turned, cosine=cosine[:, None], sine=sine[:, None])


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    width = cosine.shape[-1]
    turning, still = x[..., :width], x[..., width:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([turned, still], dim=-1) if still.shape[-1] else turned


@torch.no_grad()
def _check_alike(decoder: Any, layers: list[nn.Module], blocks: list[FlowBlock], rotary: nn.Module) -> None:
    """Raise InputError unless copies of the first and last layer do to a text's last token what the layers do."""
    rows = decoder.get_input_embeddings().num_embeddings
    ids = [[number % rows for number in (3, 14, 15, 92, 65, 35)]]
    seen = dict[int, tuple[Tensor, Tensor]]()
    watched = {0, len(layers) - 1}
    hooks = [layers[n].register_forward_hook(_watch(seen, n), with_kwargs=True) for n in watched]
    try:
        context = read_context(decoder, ids)
    finally:
        for hook in hooks:
            hook.remove()
    dtype = next(decoder.parameters()).dtype
    for number, (before, after) in seen.items():
        found = _as_text(blocks[number], before[:, -1:].float(), _cut(context), number, rotary)
        error = (found - after[:, -1:].float()).norm() / after[:, -1:].float().norm()
        if not float(error) <= _ALIKE + 4 * torch.finfo(dtype).eps:
            raise InputError(
                f"a layer of the backbone ({type(layers[number]).__name__}) computes something else from its parts "
                f"than a copy would (off by {float(error):.1e}); use a decoder such as a Llama, Qwen or SmolLM."
            )


def _watch(seen: dict[int, tuple[Tensor, Tensor]], number: int) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        seen[number] = before, output[0] if isinstance(output, tuple) else output

    return hook


def _cut(context: Context) -> Context:
    """Return the context without its last token."""
    keys, values = ([part[:, :, :-1] for part in parts] for parts in (context._keys, context._values))
    return Context(keys, values, context.mask[:, :-1])


def _as_text(block: FlowBlock, x: Tensor, context: Context, number: int, rotary: nn.Module) -> Tensor:
    """Return what a layer makes of one token after a context, without modulation."""
    turn = rotation(rotary, context.lengths[:, None])
    attended, _ = block.attention(block.attention_norm(x), context.layer(number), None, None, "none", turn)
    x = x + attended
    out: Tensor = x + block.network(block.network_norm(x))
    return out
