"""Everything that one fine-tuning run is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisa_kernels.distributed import check_wire_dtype
from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.methods import Method, method_by_name
from lisa_kernels.methods.masters import check_masters
from lisa_kernels.methods.precision import AS_THEY_ARE
from lisa_kernels.methods.resting import check_resting_where
from lisa_kernels.paging import check_paging
from lisa_kernels.sizes import parse_size
from lisa_kernels.train.sources.kinds import parse_columns

DEFAULT_STEPS = 200
# What follows from the model and the length of the run unless it is given; see `train.defaults`.
AUTOMATIC = ("lr", "period", "warmup_steps")
AUTO = "auto"
# Ours to transformers' names; its "constant" would ignore --warmup-steps.
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
# Names of --report-to, and the packages that they need.
REPORTERS = {"none": None, "tensorboard": "tensorboard", "wandb": "wandb"}
# What may differ between a run and its resumption.
_FREE = (
    "output", "resume", "overwrite", "save_every", "report_to", "eval_every", "json", "max_checkpoints", "paging",
    "offload_activations", "samples", "shard", "masters", "resting_where",
)  # fmt: skip
# Settings of methods that train some layers at a time, or fold into the weights.
_OF_LAYERS_THAT_REST = ("active_layers", "period", "scores", "design", "retired_state", "master")
# What says where and how one start of a run goes, and nothing of the run.
_OF_ONE_START = ("output", "resume", "overwrite", "json", "device", "taken")


def default_options() -> dict[str, Any]:
    """Return the options that need not be given, as they are then."""
    fields = dataclasses.fields(FineTuneOptions)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


@dataclass(frozen=True)
class FineTuneOptions:
    """Options of `lisa-kernels finetune`, one field a flag; see its help for units and defaults.

    None means: the method's own default, or one that follows from the model and the length of the run; "auto" is the
    same for lr, period and warmup_steps. taken: what of these three the run took that this one repeats, and holds where
    nothing is given. Raises InputError for values out of range.
    """

    model: str
    data: str | Sequence[str]
    output: Path
    method: str = AUTO
    active_layers: int | None = None
    period: int | None = None
    rank: int | None = None
    alpha: float | None = None
    rate_ratio: float | None = None
    targets: str | None = None
    embeddings: str | None = None
    master: str | None = None
    retired_state: str | None = None
    paging: str | None = None
    resting: str | None = None
    resting_where: str | None = None
    active_on: str | None = None
    masters: str | None = None
    wire_dtype: str | None = None
    shard: bool = False
    scores: str | None = None
    design: str | None = None
    lr: float | None = None
    lr_schedule: str = "linear"
    warmup_steps: int | None = None
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 4
    accumulate: int = 1
    seq_len: int = 512
    packing: bool = True
    dtype: str = "auto"
    device: str = "auto"
    gradient_checkpointing: bool | int | str | None = None
    offload_activations: bool = False
    keep_logits: bool = False
    seed: int = 0
    eval_fraction: float = 0.05
    eval_every: int = 0
    save_every: int = 0
    max_checkpoints: int = 2
    calibration_rows: int = 128
    max_data_bytes: int | None = None
    eval_data: str | Sequence[str] | None = None
    columns: str | None = None
    resume: bool = False
    overwrite: bool = False
    report_to: str = "none"
    samples: int | None = None
    json: bool = False
    taken: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without the model and the data."""
        for name in AUTOMATIC:
            if getattr(self, name) == AUTO:
                object.__setattr__(self, name, None)
        for name in ("data", "eval_data"):
            given = getattr(self, name)
            if given is not None and not isinstance(given, str):
                if not given:
                    raise InputError(f"--{name.replace('_', '-')} names nothing; give at least one source of rows.")
                object.__setattr__(self, name, given[0] if len(given) == 1 else tuple(given))
        if self.columns is not None:
            parse_columns(self.columns)
        for name, least in (("batch_size", 1), ("accumulate", 1), ("seq_len", 2), ("eval_every", 0), ("save_every", 0),
                            ("max_checkpoints", 1), ("warmup_steps", 0), ("calibration_rows", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} is {value}; at least {least} is wanted.")
        for name in ("steps", "epochs", "lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name} is {value}; a number above 0 is wanted.")
        if self.steps is not None and self.epochs is not None:
            raise InputError("both --steps and --epochs are given; give one of them.")
        if self.resume and self.overwrite:
            raise InputError("both --resume and --overwrite are given; give one of them.")
        recomputed = self.gradient_checkpointing
        if self.offload_activations and (isinstance(recomputed, str) or (recomputed is not None and not recomputed)):
            said = "--no-gradient-checkpointing" if recomputed is False else f"--gradient-checkpointing {recomputed}"
            raise InputError(
                f"both --offload-activations and {said} are given; only what checkpointing keeps can wait in host "
                "memory: give one of them, or the number of blocks that are recomputed."
            )
        if not 0 <= self.eval_fraction <= 0.5:
            raise InputError(f"--eval-fraction is {self.eval_fraction}; a share from 0 to 0.5 is wanted.")
        if self.max_grad_norm < 0:
            raise InputError(f"--max-grad-norm is {self.max_grad_norm}; at least 0 is wanted (0: no clipping).")
        if self.samples is not None and self.samples < 0:
            raise InputError(f"--samples is {self.samples}; at least 0 is wanted.")
        if self.lr_schedule not in SCHEDULES:
            raise unknown_name("--lr-schedule", self.lr_schedule, SCHEDULES)
        for name in self.report_to.split(","):
            if name not in REPORTERS:
                raise unknown_name("--report-to", name, REPORTERS)
        check_paging(self.paging)
        check_wire_dtype(self.wire_dtype)
        check_masters(self.masters, None if self.resting == AS_THEY_ARE else self.resting)
        check_resting_where(self.resting_where, self.resting)
        _check_recomputation(self.gradient_checkpointing)
        self.build_method()

    def settled(self, adaptable: bool = True) -> FineTuneOptions:
        """Return the options with a method: where none is given the one that learns best in the least memory.

        What was measured is in bench/README.md: LoRA in all layers, embedding and head in low rank beside it. OwLore
        where a setting is given that LoRA has not, and where a model is not `adaptable` as a whole.
        """
        if self.method != AUTO:
            return self
        draws = any(getattr(self, name) is not None for name in _OF_LAYERS_THAT_REST)
        if draws or self.embeddings in ("always", "with-first-block", "sampled"):
            return dataclasses.replace(self, method="owlore")
        if not adaptable and self.targets is None and self.alpha is None:
            return dataclasses.replace(self, method="owlore")
        return dataclasses.replace(self, method="lora", embeddings=self.embeddings or "low-rank")

    def build_method(self, default_rank: int | None = None, layers: int | None = None) -> Method:
        """Return the method with the settings given; defaults shrink to what a small model holds."""
        if self.method == AUTO:
            return self.settled().build_method(default_rank, layers)
        targets = self.targets if self.targets in (None, "all-linear") else tuple(self.targets.split(","))
        settings = {
            "active_layers": self.active_layers, "period": self.period, "rank": self.rank, "alpha": self.alpha,
            "rate_ratio": self.rate_ratio, "targets": targets, "embeddings": self.embeddings, "master": self.master,
            "scores": self.scores, "retired_state": self.retired_state, "design": self.design,
        }  # fmt: skip
        method = method_by_name(self.method, **settings)
        rank, active = method.get("rank", None), method.get("active_layers", None)
        if rank is not None and self.rank is None and default_rank is not None:
            settings["rank"] = min(rank, default_rank)
        if active is not None and self.active_layers is None and layers is not None:
            settings["active_layers"] = min(active, layers)
        return method_by_name(self.method, **settings)

    @property
    def reporters(self) -> list[str]:
        """Where figures go while the run goes on."""
        return [name for name in dict.fromkeys(self.report_to.split(",")) if name != "none"]

    def sources(self) -> list[tuple[str, str]]:
        """Return each (flag, value) that may name a file which the run reads."""
        given = (("--model", self.model), ("--data", self.data), ("--eval-data", self.eval_data or ()))
        return [(flag, one) for flag, values in given for one in ([values] if isinstance(values, str) else values)]

    def fixed(self) -> dict[str, Any]:
        """Return the options that a resumed run must share with the one it continues, as plain values."""
        return {key: value for key, value in self.recorded().items() if key not in _FREE}

    def recorded(self) -> dict[str, Any]:
        """Return the options that repeat the run elsewhere, as plain values."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in _OF_ONE_START}
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def _check_recomputation(given: bool | int | str | None) -> None:
    """Raise InputError for what is no way to say how much is recomputed."""
    if isinstance(given, str) and given != AUTO:
        parse_size(given)
    if isinstance(given, int) and given < 0:
        raise InputError(f"--gradient-checkpointing is {given}; a number of blocks of at least 0 is wanted.")
