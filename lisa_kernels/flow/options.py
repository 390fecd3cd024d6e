"""Everything that a run of `lisa-kernels flow train` is told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.flow.experts import TimestepExperts
from lisa_kernels.flow.residual_attention import check_reuse

SCHEDULES = ("constant", "linear", "cosine")
# What may differ between a run and its resumption.
_FREE = ("save_every", "eval_every", "max_checkpoints", "paging", "samples")
# What does not belong to the run but to one start of it.
_OF_ONE_START = ("output", "resume", "overwrite", "device")
_LEAST = {
    "groups": 1, "layers": 1, "hidden": 1, "heads": 1, "patch": 1, "period": 1, "steps": 1, "batch_size": 1,
    "accumulate": 1, "max_checkpoints": 1, "save_every": 0, "eval_every": 0, "warmup_steps": 0, "samples": 0,
}  # fmt: skip


@dataclass(frozen=True)
class FlowOptions:
    """Options of a run, one field a flag; see the command's help for units and defaults."""

    data: str
    output: Path
    image_size: int | None = None
    autoencoder: str | None = None
    backbone: str | None = None
    begin_from: str | None = None
    groups: int = 4
    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    patch: int = 2
    residual_attention: str = "before"
    boundaries: str = "quantile"
    times: str = "uniform"
    overlap: float = 0.05
    period: int = 1
    retired_state: str = "page"
    resting_weights: str = "keep"
    paging: str | None = None
    lr: float | None = None
    lr_schedule: str = "cosine"
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    label_dropout: float = 0.1
    average: float = 0.999
    eval_fraction: float = 0.05
    eval_every: int = 0
    save_every: int = 0
    max_checkpoints: int = 2
    samples: int | None = None
    device: str = "auto"
    seed: int = 0
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without data and model."""
        for name, least in _LEAST.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise InputError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; at least {least} is wanted."
                )  # fmt: skip
        if self.lr is not None and not self.lr > 0:
            raise InputError(f"--lr is {self.lr}; a number above 0 is wanted.")
        for name, most in (("eval_fraction", 0.5), ("label_dropout", 1.0), ("average", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise InputError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; a share from 0 to {most:g} is wanted."
                )
        if self.max_grad_norm < 0:
            raise InputError(f"--max-grad-norm is {self.max_grad_norm}; at least 0 is wanted (0: no clipping).")
        if self.lr_schedule not in SCHEDULES:
            raise unknown_name("--lr-schedule", self.lr_schedule, SCHEDULES)
        if self.resume and self.overwrite:
            raise InputError("both --resume and --overwrite are given; give one of them.")
        given = [name for name in ("layers", "hidden", "heads") if getattr(self, name) is not None]
        if self.backbone is not None and given:
            raise InputError(f"--{given[0]} follows from the layers of --backbone, which are copied; leave it out.")
        check_reuse(self.residual_attention)
        self.build_method()

    def build_method(self) -> TimestepExperts:
        """Return the method with the settings given. Raises InputError."""
        return TimestepExperts(
            groups=self.groups, period=self.period, boundaries=self.placed(), times=self.times, overlap=self.overlap,
            retired_state=self.retired_state, resting_weights=self.resting_weights,
        )  # fmt: skip

    def placed(self) -> str | tuple[float, ...]:
        """Return the boundaries: a placement by name, or numbers."""
        if not self.boundaries[:1].isdigit():
            return self.boundaries
        try:
            return tuple(float(number) for number in self.boundaries.split(","))
        except ValueError as error:
            raise InputError(
                f"--boundaries is {self.boundaries!r}; quantile, uniform, or numbers as 0,0.25,0.5,0.75,1 are wanted."
            ) from error

    def sources(self) -> list[tuple[str, str]]:
        """Return each (flag, value) that may name a file which the run reads."""
        folder = self.data.partition(":")[2] or self.data
        read = {"--autoencoder": self.autoencoder, "--backbone": self.backbone, "--begin-from": self.begin_from}
        return [("--data", folder), *((flag, value) for flag, value in read.items() if value)]

    def fixed(self) -> dict[str, Any]:
        """Return the options that a resumed run must share with the one it continues, as plain values."""
        return {key: value for key, value in self.recorded().items() if key not in _FREE}

    def recorded(self) -> dict[str, Any]:
        """Return the options that repeat the run elsewhere, as plain values."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in _OF_ONE_START}
