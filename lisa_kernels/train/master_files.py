"""Where the masters of a run's resting weights are: in host memory where there is room for them, else in files."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from torch import nn

from lisa_kernels.methods.masters import IN_MEMORY, check_masters
from lisa_kernels.methods.resting import AS_THEY_ARE
from lisa_kernels.paging.masters import MasterFolder
from lisa_kernels.sizes import gb
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.recomputation import available_bytes
from lisa_kernels.train.run_folder import MASTERS_FOLDER

# Of the memory that is free, what masters may take of it: data, activations and other programs want some too.
SHARE = 0.5


def settled_masters(options: FineTuneOptions, model: nn.Module, console: Console) -> str | None:
    """Return the folder of the masters, None: they are in host memory, or there are none; says what was not given.

    What a killed run has left beside the run goes.
    """
    beside = options.output / MASTERS_FOLDER
    if options.resting in (None, AS_THEY_ARE):
        folder = None
    elif options.masters is None:
        wanted, free = sum(param.nbytes for param in model.parameters() if param.dim() > 1), available_bytes()
        folder = str(beside) if wanted > SHARE * free else None
        if folder is not None:
            console.print(
                f"note: the masters of the resting weights take {gb(wanted)} and {gb(free)} of memory are free: they "
                f"are files in {folder} while the run lasts; --masters FOLDER names another disk, --masters {IN_MEMORY}"
                " keeps them in memory",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
    else:
        folder = check_masters(options.masters, options.resting)
    if beside.is_dir() and (folder is None or Path(folder).resolve() != beside.resolve()):
        MasterFolder(beside, 0).close()
    return folder


def tell_written(nbytes: int, console: Console) -> None:
    """Say what a run has written of masters; nothing where they were in memory."""
    if nbytes:
        console.print(f"masters: {gb(nbytes)} written to the disk", highlight=False)
