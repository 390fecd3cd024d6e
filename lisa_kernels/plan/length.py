"""How long a planned run is, which the period follows from where it is not given."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lisa_kernels.methods import Method
from lisa_kernels.train import defaults
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.taken import drawn_layers, period_reason, run_steps


@dataclass(frozen=True)
class RunLength:
    """The optimizer steps of a run and the layers that are drawn from; steps: None where its data decide them."""

    steps: int | None
    layers: int

    @classmethod
    def of(cls, options: FineTuneOptions, method: Method, model: Any) -> RunLength | None:
        """Return what the period follows from; None where there is none, or where it is given."""
        if method.get("period", None) is None or options.period is not None:
            return None
        return cls(None if options.epochs is not None else run_steps(options, 0), drawn_layers(model, method))

    def applied_to(self, method: Method) -> Method:
        """Return the method with the period that a run of this length takes; as it is where that is not known."""
        if self.steps is None:
            return method
        active = method.get("active_layers", 1)
        period = defaults.period(self.steps, self.layers, active, method.get("period", 1))
        return dataclasses.replace(method, period=period)  # type: ignore[call-arg]

    def describe(self, method: Method) -> str:
        """Return what to say of the period that a run of this length takes."""
        if self.steps is None:
            return "the period follows from the number of steps, which is known once the data are read"
        period = self.applied_to(method).get("period", 1)
        return f"period {period}{period_reason(period, self.steps, self.layers, method)}"
