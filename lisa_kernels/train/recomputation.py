"""How many blocks of a run compute their activations again: as few as memory allows, where nobody said."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lisa_kernels.errors import NotRehearsedError
from lisa_kernels.sizes import gb, parse_size
from lisa_kernels.train.configs import load_config
from lisa_kernels.train.memory import PlannedMemory
from lisa_kernels.train.options import AUTO, FineTuneOptions
from lisa_kernels.train.placement import Memory

# Above this many parameters activations outweigh what recomputing them costs.
CHECKPOINTING_FROM = 500_000_000
# Of what a machine has to spare, left to what no plan of a CPU run counts: buffers, libraries, other programs.
KEPT_ON_CPU = 0.1


def checkpointed_blocks(options: FineTuneOptions, model: Any) -> int | None:
    """Return how many of the model's blocks are recomputed: None for all, 0 for none.

    As it was told, else by the size of the model. What is still to be settled by memory counts as all.
    """
    given = options.gradient_checkpointing
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    if given is None:
        parameters: int = sum(param.numel() for param in model.parameters())
        return None if options.offload_activations or parameters >= CHECKPOINTING_FROM else 0
    return 0 if given is False else None


def settle_recomputation(
    options: FineTuneOptions, plan: Callable[[FineTuneOptions], PlannedMemory] | None, device: torch.device,
    console: Console,
) -> FineTuneOptions:  # fmt: skip
    """Return the options with a number of blocks where they have "auto" or a size; all blocks where nothing fits.

    The number is found from plans of the run: its memory falls with each block that is recomputed.
    """
    if not isinstance(options.gradient_checkpointing, str):
        return options
    everything = dataclasses.replace(options, gradient_checkpointing=True)
    if plan is None:
        return everything
    budget = _budget(options.gradient_checkpointing, device)
    blocks = int(load_config(options.model).get_text_config().num_hidden_layers)

    def fits(count: int) -> bool:
        tried = dataclasses.replace(options, gradient_checkpointing=count or False)
        with console.status(f"rehearsing with {count} of {blocks} blocks recomputed"):
            return plan(tried).needed_bytes <= budget

    try:
        fewest = fewest_blocks(blocks, fits)
    except NotRehearsedError:
        return everything
    console.print(f"{fewest} of {blocks} blocks are recomputed, for {gb(budget)}", highlight=False)
    return dataclasses.replace(options, gradient_checkpointing=True if fewest == blocks else fewest or False)


def fewest_blocks(blocks: int, fits: Callable[[int], bool]) -> int:
    """Return the least number of recomputed blocks with which a run fits, and all `blocks` where none does."""
    low, high = 0, blocks
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


def _budget(given: str, device: torch.device) -> int:
    if given != AUTO:
        return parse_size(given)
    if device.type == "cuda":
        return Memory.of(device).free
    return int(available_bytes() * (1 - KEPT_ON_CPU))


def available_bytes() -> int:
    """Return what programs may still take of this machine's memory."""
    table = Path("/proc/meminfo")
    if table.exists():
        line = next(line for line in table.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
