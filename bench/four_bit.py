"""A decoder with its blocks in bitsandbytes' NF4, as people's QLoRA has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.plan.stand_ins import META

FOUR_BIT_BLOCK, FOUR_BIT_SCALES = 64, 256


def four_bit_blocks(model: Any) -> None:
    """Put the linears of a decoder's blocks in NF4 with doubly quantised scales, as QLoRA has them."""
    import bitsandbytes

    for block in model.model.layers:
        for path, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                parent = block.get_submodule(path.rpartition(".")[0])
                setattr(parent, path.rpartition(".")[2], _four_bit(bitsandbytes, layer))


def _four_bit(bitsandbytes: Any, layer: nn.Linear) -> Any:
    """Return the layer with its weight in NF4: quantised where it has values, else with storages of those sizes."""
    made = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=layer.weight.dtype,
        compress_statistics=True, quant_type="nf4", device=layer.weight.device,
    )  # fmt: skip
    if layer.weight.is_meta:
        made.weight = _empty_four_bit(bitsandbytes, layer)
    else:
        made.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        made = made.to(layer.weight.device)
    # Where a CPU has bfloat16 products an evaluation packs codes in another order, which training then reads wrongly.
    made.support_avx512bf16_for_cpu = False
    return made.requires_grad_(False)


def _empty_four_bit(bitsandbytes: Any, layer: nn.Linear) -> Any:
    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    state = bitsandbytes.functional.QuantState
    blocks = layer.weight.numel() // FOUR_BIT_BLOCK
    scales = state(
        absmax=empty(-(-blocks // FOUR_BIT_SCALES), dtype=torch.float32), code=empty(256, dtype=torch.float32),
        blocksize=FOUR_BIT_SCALES, dtype=torch.float32,
    )  # fmt: skip
    whole = state(
        absmax=empty(blocks, dtype=torch.uint8), shape=layer.weight.shape, code=empty(16, dtype=torch.float32),
        blocksize=FOUR_BIT_BLOCK, quant_type="nf4", dtype=layer.weight.dtype,
        offset=empty(dtype=torch.float32), state2=scales,
    )  # fmt: skip
    return bitsandbytes.nn.Params4bit(
        empty(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False, quant_state=whole,
        blocksize=FOUR_BIT_BLOCK, quant_type="nf4", bnb_quantized=True,
    )  # fmt: skip
