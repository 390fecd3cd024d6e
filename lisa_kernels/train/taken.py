"""The settings that a run takes where they were not given, and the sentence that says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lisa_kernels.methods import Method, method_by_name
from lisa_kernels.methods.survey import survey_model
from lisa_kernels.train import defaults
from lisa_kernels.train.counting import steps_of_passes
from lisa_kernels.train.options import DEFAULT_STEPS, FineTuneOptions


@dataclass(frozen=True)
class Taken:
    """What a run trains with, whether it was given or not; period: None of methods that draw no layers."""

    lr: float
    period: int | None
    warmup_steps: int

    def applied_to(self, method: Method) -> Method:
        """Return the method with the period taken."""
        return method if self.period is None else dataclasses.replace(method, period=self.period)  # type: ignore[call-arg]


@dataclass(frozen=True)
class Grounds:
    """What automatic settings follow from: the method with what was given of it, optimizer steps, the model's sizes.

    layers: those that are drawn from; 0 of methods that draw none. width: the hidden size.
    """

    method: Method
    steps: int
    width: int
    layers: int

    @property
    def share(self) -> float:
        """The share of the layers that train at a time; 0 where none are drawn."""
        return _active(self.method) / self.layers if self.layers else 0.0

    @classmethod
    def of(cls, options: FineTuneOptions, method: Method, model: Any, rows: int) -> Grounds:
        """Return the grounds of a run on so many rows."""
        return cls(method, run_steps(options, rows), hidden_size(model), drawn_layers(model, method))

    def take(self, options: FineTuneOptions, recorded: Mapping[str, Any]) -> Taken:
        """Return what is given, else what is recorded of the run that goes on or is repeated, else what follows."""
        method = self.method

        def settled(name: str, automatic: Any) -> Any:
            given = getattr(options, name)
            return given if given is not None else recorded.get(name, automatic)

        published = method.get("period", None)
        follows = None if published is None else defaults.period(self.steps, self.layers, _active(method), published)
        return Taken(
            settled("lr", defaults.rate(method.name, self.width, method.get("scale", 1.0), self.share)),
            None if published is None else settled("period", follows),
            settled("warmup_steps", defaults.warmup_steps(self.steps)),
        )

    def describe(self, taken: Taken, options: FineTuneOptions, recorded: Mapping[str, Any]) -> str | None:
        """Return the sentence that names what was not given, and why it is what it is; None where all was given."""
        warmup = f"{taken.warmup_steps} step{'s' * (taken.warmup_steps != 1)} of warm-up"
        said = {"lr": f"learning rate {short(taken.lr)}", "period": f"period {taken.period}", "warmup_steps": warmup}
        why = {"lr": f" for a width of {self.width}" + self._of_layers(), "period": "", "warmup_steps": ""}
        if taken.period is None:
            del said["period"]
        else:
            why["period"] = period_reason(taken.period, self.steps, self.layers, self.method)
        parts = [
            text + (" as recorded" if name in recorded else why[name])
            for name, text in said.items()
            if getattr(options, name) is None
        ]
        return f"took: {', '.join(parts)}" if parts else None

    def _of_layers(self) -> str:
        shared = self.method.name == "owlore" and self.share > defaults.MEASURED_SHARE
        return f" and {_active(self.method)} of {self.layers} layers at a time" if shared else ""


def run_steps(options: FineTuneOptions, rows: int) -> int:
    """Return the optimizer steps of a run on so many rows."""
    if options.epochs is not None:
        return steps_of_passes(options.epochs, rows, options.batch_size, options.accumulate)
    return options.steps or DEFAULT_STEPS


def hidden_size(model: Any) -> int:
    """Return the width of the residual stream, which is the fan-in of most of a model's matrices."""
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    return width if isinstance(width, int) else int(model.get_input_embeddings().weight.shape[-1])


def drawn_layers(model: Any, method: Method) -> int:
    """Return how many layers the method draws from; 0 where it draws none."""
    return 0 if method.get("period", None) is None else len(survey_model(model, method).drawable)


def recorded_in(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run took by its run.json; of one that recorded none of it, what every run took in its time."""
    if "taken" in run or "options" not in run:
        return dict(run.get("taken", {}))
    options = run["options"]
    method = method_by_name(options["method"])
    old = {
        "lr": defaults.RATES_OF_OLD_RUNS[method.name], "period": method.get("period", None), "warmup_steps": 0,
    }  # fmt: skip
    return {name: value if options.get(name) is None else options[name] for name, value in old.items()}


def period_reason(period: int, steps: int, layers: int, method: Method) -> str:
    """Return why a period is what it is, to be said after it."""
    if period == method.get("period", None):
        return " as published"
    visits = steps / period * _active(method) / layers
    return f" so that {layers} layers are drawn {visits:.2g} times on average in {steps} steps"


def short(number: float) -> str:
    """Return a rate as one writes it: 4.9e-4."""
    mantissa, exponent = f"{number:.6e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _active(method: Method) -> int:
    active: int = method.get("active_layers", 1)
    return active
