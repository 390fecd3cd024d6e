"""The training rows by which a size for weights at rest is filled."""

from __future__ import annotations

from rich.console import Console
from torch import Tensor

from lisa_kernels.methods.code_losses import BATCHES
from lisa_kernels.methods.precision import is_size
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.packing import collate
from lisa_kernels.train.tokenize import TokenizedData


def rows_for_size(
    options: FineTuneOptions, data: TokenizedData, pad: int, console: Console
) -> list[dict[str, Tensor]] | None:  # fmt: skip
    """Return batches of the first training rows for `attach(calibration=...)`; None where nothing rests by size."""
    if options.resting is None or not is_size(options.resting):
        return None
    count = min(len(data), BATCHES)
    console.print(
        f"note: which matrices rest in 8 bits and which in 4 is found on the host, by a forward and a backward of "
        f"{count} training rows",
        highlight=False,
    )
    return [collate([data[index]], pad) for index in range(count)]
