"""The arms of the experiment on layers as experts for a part of the flow: models, and how each is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lisa_kernels import TimestepExperts
from lisa_kernels.flow.transformer import FlowShape, FlowTransformer

LAYERS = 12
GROUPS = (3, 4)


@dataclass(frozen=True)
class Size:
    """dense_steps: of the dense model of all layers; the others take as many, and then as many layer passes.

    side and patch: of a picture and of a token, in pixels.
    """

    dense_steps: int = 300
    batch: int = 64
    hidden: int = 48
    heads: int = 4
    lr: float = 6e-3
    decay: float = 0.99
    side: int = 8
    patch: int = 2

    def key(self) -> dict[str, Any]:
        """Return the values that rows of one experiment share; the pictures are those of its file."""
        return {name: value for name, value in asdict(self).items() if name not in ("side", "patch")}


@dataclass(frozen=True)
class Arm:
    """One line of the table; groups: 1 is a dense model of `layers` layers.

    copied_after: the share of its steps that a dense model of a group's layers takes, of which all groups then begin as
    copies.
    """

    name: str
    layers: int = LAYERS
    groups: int = 1
    reuse: str = "none"
    boundaries: str = "uniform"
    times: str = "uniform"
    overlap: float = 0.0
    copied_after: float = 0.0

    @property
    def layers_run(self) -> int:
        """Layers that a step, or an evaluation, goes through."""
        return self.layers // self.groups

    def method(self, retired_state: str = "keep") -> TimestepExperts:
        """Return how the arm is trained."""
        return TimestepExperts(
            groups=self.groups, boundaries=self.boundaries, times=self.times, overlap=self.overlap,
            retired_state=retired_state,
        )  # fmt: skip

    def model(self, size: Size) -> FlowTransformer:
        """Return a model for images in ten classes, with random weights."""
        shape = FlowShape(
            1, size.side, size.side, 10, patch=size.patch, hidden=size.hidden, layers=self.layers, heads=size.heads,
            reuse=self.reuse,
        )  # fmt: skip
        return FlowTransformer(shape, self.method().intervals())

    def budgets(self, steps: int) -> dict[str, int]:
        """Return the steps of each budget: as many as the dense model of all layers takes, or as many layer passes.

        Where a share of them comes first there is one budget, the second.
        """
        passes = {"passes": steps * LAYERS // self.layers_run}
        return passes if self.copied_after else {"steps": steps, **passes}

    def dense(self) -> Arm:
        """Return a dense model of as many layers as a group has."""
        return Arm(self.name, self.layers_run)


def arms_of(groups: int) -> list[Arm]:
    """Return the arms of so many groups, the dense model of as many layers as one of them first."""
    run = LAYERS // groups
    return [
        Arm(f"B dense, {run} layers", layers=run),
        Arm(f"C {groups} groups", groups=groups),
        Arm(f"D {groups} groups, residual attention", groups=groups, reuse="before"),
        Arm(
            f"E {groups} groups, logit-normal t, quantiles, overlap", groups=groups, boundaries="quantile",
            times="logit-normal", overlap=0.05,
        ),
        # An overlap of as many intervals as there are is all of time.
        Arm(f"F {groups} groups, each on all t", groups=groups, overlap=float(groups)),
        Arm(f"G {groups} groups, copies of one after 2/3", groups=groups, copied_after=2 / 3),
    ]  # fmt: skip


ARMS = [
    Arm(f"A dense, {LAYERS} layers"),
    *arms_of(3),
    *arms_of(4),
    Arm(f"A dense, {LAYERS} layers, logit-normal t", times="logit-normal"),
]
