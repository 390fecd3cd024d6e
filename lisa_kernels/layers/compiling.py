"""Decoder blocks compiled one by one: a switch of layers changes what each does, and none of their code."""

from __future__ import annotations

from typing import Any

from torch import nn

from lisa_kernels.layers.blocks import find_blocks


def compile_blocks(model: nn.Module, **settings: Any) -> None:
    """Have each decoder block of a model run compiled, before or after it is attached.

    Equal blocks share their graphs. What a block does takes a few: at rest, drawn, and drawn in a step that finds
    bases, each with or without a gradient for its input; once every one of them has come, no switch compiles anything.
    `torch.compile(model)` gives the same numbers, but has all blocks in one graph, which is compiled anew for every
    draw, and runs uncompiled from torch's limit on. settings: of `torch.compile`, such as backend or fullgraph.

    The key-value cache is switched off: training does not read it, and each block would be compiled for its own place
    in it. Raises InputError where no decoder blocks are found.
    """
    _, blocks = find_blocks(model)
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    for block in blocks:
        block.compile(**settings)
