"""Gradient checkpointing of as many decoder blocks as memory asks for: each that keeps its activations is faster."""

from __future__ import annotations

from typing import Any

from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.layers.blocks import find_blocks


def checkpoint_blocks(model: Any, count: int | None = None, **settings: Any) -> None:
    """Have the lowest `count` decoder blocks keep only what enters them, and compute the rest again in the backward.

    model: one of transformers', before or after it is attached. None: all blocks, and whatever else the model
    recomputes. The highest blocks keep their activations, for a backward begins there and gives them up first: while a
    lower block is recomputed, they are gone. settings: more arguments of `torch.utils.checkpoint.checkpoint`; it is
    the form that is not re-entrant. Raises InputError for more blocks than there are, and for blocks that do not go
    through transformers' checkpointing.
    """
    blocks: tuple[nn.Module, ...] = ()
    if count is not None:
        path, blocks = find_blocks(model)
        if not 0 <= count <= len(blocks):
            raise InputError(
                f"{count} blocks cannot be recomputed: {path} has {len(blocks)}; give a number from 0 to {len(blocks)}."
            )
    # The new name came with transformers 5.20; the old one goes with 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **settings})
    if count is not None and not all(getattr(block, "gradient_checkpointing", False) for block in blocks):
        model.gradient_checkpointing_disable()
        raise InputError(
            f"the blocks of a {type(model).__name__} do not recompute one by one as transformers' own do; have all "
            "of them recompute, or none."
        )
    for block in blocks[count:]:
        for module in block.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False  # type: ignore[assignment]
