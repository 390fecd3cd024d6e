"""The projection of one matrix's full gradient on a few directions: its sides, its bases, and the way back.

Source: GaLore, arXiv 2403.03507, algorithm 2, with its published code's five types of projection; unlike there, bases
come from range finders instead of full SVDs, and the moments are carried into each new basis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.basis import BasisTracker, transport_moments
from lisa_kernels.distributed import is_sharded
from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.ops.project import project

# What a group with a rank may say besides, and what holds where it does not.
DEFAULTS = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
# On which side of a tall (or square) and of a wide matrix its bases stand.
SIDES = {
    "std": (("right",), ("left",)),
    "reverse_std": (("left",), ("right",)),
    "right": (("right",), ("right",)),
    "left": (("left",), ("left",)),
    "full": (("left", "right"), ("left", "right")),
}


def is_projected(group: dict[str, Any]) -> bool:
    """Return whether the matrices of a parameter group are projected: groups without a rank train as they are."""
    return group.get("rank") is not None


def check_settings(group: dict[str, Any]) -> None:
    """Raise InputError unless the projection that a parameter group asks for, if it asks for one, makes sense."""
    if not is_projected(group):
        for name in ("update_proj_gap", "proj_type"):
            if name in group and "rank" not in group:
                raise InputError(f"a parameter group has {name} but no rank; add rank, or rank=None for plain AdamW.")
        return
    given = {**DEFAULTS, **group}
    for name in ("rank", "update_proj_gap"):
        if not isinstance(given[name], int) or isinstance(given[name], bool) or given[name] < 1:
            raise InputError(f"{name} is {given[name]!r}; a whole number of at least 1 is wanted.")
    scale = given["scale"]
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not 0 < scale < math.inf:
        raise InputError(f"scale is {scale!r}; a finite number above 0 is wanted.")
    if given["proj_type"] not in SIDES:
        raise unknown_name("proj_type", str(given["proj_type"]), SIDES)


def check_matrices(group: dict[str, Any]) -> None:
    """Raise InputError unless every parameter of a projected group is a matrix that its rank fits."""
    rank = group["rank"]
    for param in group["params"]:
        if is_sharded(param):
            raise InputError(
                f"a parameter {list(param.shape)} in a group with rank {rank} is sharded, and a projection is of the "
                "whole gradient: attach(model, GaLore(...)) trains sharded models."
            )
        if param.dim() != 2:
            raise InputError(
                f"a parameter of shape {list(param.shape)} is in a group with rank {rank}; only matrices can be "
                "projected: put it into a group without rank."
            )
        if rank > min(param.shape):
            raise InputError(
                f"rank is {rank}, above the smaller side of a parameter of shape {list(param.shape)}; use at most "
                f"{min(param.shape)}."
            )


class Projection:
    """How one matrix's gradient G [m, n] becomes R and R's update an update of the matrix.

    Bases have orthonormal rows and are kept with the optimizer's state: `right_basis` P [r, n], R = P Gᵀ [r, m];
    `left_basis` Q [r, m], R = Q G [r, n]; with both, R = Q G Pᵀ [r, r].
    """

    def __init__(self, shape: torch.Size, group: dict[str, Any]) -> None:
        m, n = shape
        self.shape, self.rank = shape, group["rank"]
        self.sides = SIDES[group["proj_type"]][m < n]
        self.trackers = {
            # No early attempts: a first basis is made from a gradient known to be good.
            side: BasisTracker(self.rank, gap=group["update_proj_gap"], offset=0, seed=0, stream=0, early=False)
            for side in self.sides
        }

    @property
    def slot_shape(self) -> torch.Size:
        """The shape of R."""
        m, n = self.shape
        columns = self.rank if len(self.sides) == 2 else m if self.sides == ("right",) else n
        return torch.Size((self.rank, columns))

    @property
    def due(self) -> bool:
        """Whether a basis is missing or should be refreshed."""
        return any(tracker.due for tracker in self.trackers.values())

    @property
    def has_bases(self) -> bool:
        """Whether there are bases already."""
        return all(tracker.has_basis for tracker in self.trackers.values())

    def new_bases(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Return the bases' tensors by their names in the state, zero until the first gradient is seen."""
        columns = {"left": self.shape[0], "right": self.shape[1]}
        return {
            f"{side}_basis": torch.zeros(self.rank, columns[side], dtype=dtype, device=device) for side in self.sides
        }

    def start(self) -> None:
        """Forget the bases."""
        for tracker in self.trackers.values():
            tracker.start(0)

    def advance(self) -> None:
        """Count a step; each basis is due once in a gap."""
        for tracker in self.trackers.values():
            tracker.advance()

    def refresh(self, state: dict[str, Tensor], gradient: Tensor) -> bool:
        """Make or refresh the bases that are due, in place; returns whether moments must be carried along.

        gradient: any float dtype [m, n]; it is held once in float32 meanwhile.
        """
        gradient = gradient.to(torch.float32)
        for side, tracker in self.trackers.items():
            tracker.update(gradient if side == "right" else gradient.t(), state[f"{side}_basis"])
        return any(tracker.rotation is not None for tracker in self.trackers.values())

    def transport(
        self, m: Tensor, v: Tensor, step: Tensor, betas: tuple[float, float], projected: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the moments, float32 of R's shape, in the bases of the last refresh; see `transport_moments`.

        projected: R of the gradient that made these bases.
        """
        for axis, tracker in enumerate(self.trackers.values()):
            turn = tracker.take_turn()
            if turn is not None and axis == 0:
                m, v = transport_moments(m, v, turn[0], step, betas, projected)
            elif turn is not None:
                turned = transport_moments(m.t(), v.t(), turn[0], step, betas, projected.t())
                m, v = (moment.t() for moment in turned)
        return m, v

    def project(self, state: dict[str, Tensor], gradient: Tensor) -> Tensor:
        """Return R in float32."""
        if self.sides == ("left",):
            return project(state["left_basis"], gradient.t())
        projected = project(state["right_basis"], gradient)
        return project(state["left_basis"], projected) if "left" in self.sides else projected

    def factors(self, state: dict[str, Tensor], slot: Tensor) -> tuple[Tensor, Tensor]:
        """Return (left [r, m], right [r, n]) whose product leftᵀ · right is `slot`, of R's shape, lifted to [m, n]."""
        if self.sides == ("right",):
            return slot, state["right_basis"]
        if self.sides == ("left",):
            return state["left_basis"], slot
        return state["left_basis"], slot @ state["right_basis"].to(torch.float32)


def stagger(projections: Iterable[Projection], seed: int) -> None:
    """Spread the refreshes of all bases evenly over their gaps, and give each random numbers of its own."""
    trackers = [tracker for projection in projections for tracker in projection.trackers.values()]
    for index, tracker in enumerate(trackers):
        tracker.seed, tracker.stream = seed, index
        tracker.offset = index * tracker.gap // len(trackers)
