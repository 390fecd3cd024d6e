"""Weights at rest in 8 bits and in 4: the training rows by which that is found, and what was found."""

from __future__ import annotations

from rich.console import Console
from torch import Tensor, nn

from lisa_kernels.layers import RestingLinear
from lisa_kernels.methods.code_losses import BATCHES
from lisa_kernels.methods.precision import MIXED, bytes_at_rest, is_picked
from lisa_kernels.sizes import gb
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.packing import collate
from lisa_kernels.train.tokenize import TokenizedData

# Of a row: without a GPU each takes two cores 12 ms for a block of an 8B model.
ROW_TOKENS = 288


def rows_for_size(
    options: FineTuneOptions, data: TokenizedData, pad: int, console: Console
) -> list[dict[str, Tensor]] | None:  # fmt: skip
    """Return the beginnings of the first training rows for `attach(calibration=...)`; None where nothing is found."""
    if not is_picked(options.resting):
        return None
    count = min(len(data), BATCHES)
    console.print(
        f"note: which matrices rest in 8 bits and which in 4 is found by a forward and a backward of {count} training "
        f"rows (up to {ROW_TOKENS} tokens of each), a block at a time",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return [
        collate([{name: values[:ROW_TOKENS] for name, values in data[index].items()}], pad) for index in range(count)
    ]


def tell_picks(options: FineTuneOptions, model: nn.Module, console: Console) -> None:
    """Say how many matrices of an attached model rest in 8 bits, where that was found."""
    if not is_picked(options.resting):
        return
    layers = [module for module in model.modules() if isinstance(module, RestingLinear)]
    in_8_bits = sum(layer.kind == "int8" for layer in layers)
    codes = gb(sum(bytes_at_rest(layer, layer.kind) for layer in layers))
    bound = "" if options.resting == MIXED else f" of {options.resting}"
    console.print(
        f"note: {in_8_bits} of {len(layers)} matrices rest in 8 bits, the others in 4: {codes}{bound}", highlight=False
    )
