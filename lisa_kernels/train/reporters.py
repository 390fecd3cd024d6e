"""Where the figures of a run go while it runs: transformers' own integrations, by name."""

from __future__ import annotations

from typing import Any

from lisa_kernels.errors import InputError
from lisa_kernels.requirements import is_installed
from lisa_kernels.train.options import REPORTERS, FineTuneOptions


def check_reporters(options: FineTuneOptions) -> None:
    """Raise InputError where the package of a reporter is missing."""
    for name in options.reporters:
        package = REPORTERS[name]
        if package is not None and not is_installed(package):
            raise InputError(
                f"--report-to {name} needs the package {package}, which is not installed; run pip install {package}, "
                "or leave it out (OUTPUT/report.html needs nothing)."
            )


def reporters(options: FineTuneOptions, trainer: Any) -> list[Any]:
    """Return the callbacks that send logs on, ready to; they go after those that add to the logs.

    Raises InputError where one cannot begin, as wandb where nobody is logged in.
    """
    from transformers import integrations

    found = []
    for name in options.reporters:
        if name == "tensorboard":
            callback = integrations.TensorBoardCallback()
            callback.logging_dir = str(options.output / "tensorboard")
        else:
            callback = integrations.WandbCallback()
            _begin_wandb(callback, trainer)
        found.append(callback)
    return found


def _begin_wandb(callback: Any, trainer: Any) -> None:
    try:
        callback.setup(trainer.args, trainer.state, trainer.model)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"--report-to wandb: wandb does not begin ({reason}); run wandb login, or set WANDB_MODE=offline, or leave "
            "it out."
        ) from error
