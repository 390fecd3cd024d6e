"""Where the figures of a run go while it runs: transformers' own integrations, by name."""

from __future__ import annotations

import importlib.util
from typing import Any

from lisa_kernels.errors import InputError
from lisa_kernels.train.options import REPORTERS, FineTuneOptions


def check_reporters(options: FineTuneOptions) -> None:
    """Raise InputError where the package of a reporter is missing."""
    for name in options.reporters:
        package = REPORTERS[name]
        if package is not None and importlib.util.find_spec(package) is None:
            raise InputError(
                f"--report-to {name} needs the package {package}, which is not installed; run pip install {package}, "
                "or leave it out (OUTPUT/report.html needs nothing)."
            )


def reporters(options: FineTuneOptions) -> list[Any]:
    """Return the callbacks that send logs on; they go after those that add to the logs."""
    from transformers.integrations import TensorBoardCallback, WandbCallback

    def tensorboard() -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return TensorBoardCallback(SummaryWriter(log_dir=str(options.output / "tensorboard")))

    known = {"tensorboard": tensorboard, "wandb": WandbCallback}
    return [known[name]() for name in options.reporters]
