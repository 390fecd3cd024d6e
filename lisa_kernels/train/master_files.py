"""Where the masters of a run's resting weights are: in host memory where there is room for them, else in files."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from rich.console import Console
from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.methods import Method, SampledAdamW
from lisa_kernels.methods.masters import IN_MEMORY, MasterBytes, check_masters
from lisa_kernels.methods.precision import AS_THEY_ARE
from lisa_kernels.methods.survey import survey_model
from lisa_kernels.paging.masters import SUFFIX, MasterFolder, is_left_by_a_run
from lisa_kernels.sizes import gb
from lisa_kernels.train.empty_model import empty_model
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.recomputation import available_bytes
from lisa_kernels.train.run_folder import MASTERS_FOLDER
from lisa_kernels.train.save_rehearsal import run_bytes

# Of the memory that is free, what masters may take of it: data, activations and other programs want some too.
SHARE = 0.5


def choose_masters(options: FineTuneOptions, console: Console) -> FineTuneOptions:
    """Return the options of a run with the place of its masters, where nobody gave one; says so if they are files.

    Before the model is loaded: what is planned of the run is then of these.
    """
    if options.resting in (None, AS_THEY_ARE) or options.masters is not None:
        return options
    model = empty_model(options.model, options.dtype)
    wanted, free = sum(param.nbytes for param in model.parameters() if param.dim() > 1), available_bytes()
    if wanted <= SHARE * free:
        return options
    folder = str(options.output / MASTERS_FOLDER)
    console.print(
        f"note: the masters of the resting weights take {gb(wanted)} and {gb(free)} of memory are free: they are files "
        f"in {folder} while the run lasts; --masters FOLDER names another disk, --masters {IN_MEMORY} keeps them in "
        "memory",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return dataclasses.replace(options, masters=folder)


def master_folder(options: FineTuneOptions, model: nn.Module, method: Method) -> str | None:
    """Return the folder of the masters, None: they are in host memory, or there are none.

    What a killed run has left beside the run goes. Raises InputError where masters and what the run saves have no room
    together.
    """
    beside = options.output / MASTERS_FOLDER
    resting = None if options.resting == AS_THEY_ARE else options.resting
    folder = check_masters(options.masters, resting)
    if is_left_by_a_run(beside) and (folder is None or Path(folder).resolve() != beside.resolve()):
        MasterFolder(beside, 0).close()
    if folder is not None:
        _check_room_for_both(options, model, method, Path(folder).expanduser().absolute())
    return folder


def _check_room_for_both(options: FineTuneOptions, model: nn.Module, method: Method, folder: Path) -> None:
    """Raise InputError where the masters' disk is the run's, and too small for both."""
    place, run = (next(path for path in (each, *each.parents) if path.exists()) for each in (folder, _of(options)))
    if place.stat().st_dev != run.stat().st_dev:
        return
    masters = MasterBytes.of(survey_model(model, method)).wanted
    whole, checkpoints, each = run_bytes(options, model)
    free = shutil.disk_usage(place).free + sum(path.stat().st_size for path in place.glob(f"*{SUFFIX}*"))
    if free < masters + whole + checkpoints * each:
        raise InputError(
            f"masters take up to {masters:,} bytes on the disk, and the run saves {whole + checkpoints * each:,} on "
            f"the same one, which has {free:,} left; name a folder on another disk with --masters, or make room."
        )


def _of(options: FineTuneOptions) -> Path:
    return options.output.absolute()


def tell_written(optimizer: SampledAdamW, console: Console) -> None:
    """Say what a run has written of masters and of codes, and read of these; nothing where they were in memory."""
    if optimizer.master_bytes_written:
        console.print(f"masters: {gb(optimizer.master_bytes_written)} written to the disk", highlight=False)
    if optimizer.code_bytes_written:
        console.print(
            f"codes: {gb(optimizer.code_bytes_written)} written to the disk, {gb(optimizer.code_bytes_read)} read from "
            "there or from the system's file cache",
            highlight=False,
        )
