"""How matrices rest where a model computes: what may be asked for, and in how many bits each matrix is then."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.layers import linear_shape
from lisa_kernels.methods.definitions import Method
from lisa_kernels.methods.survey import Survey

AS_THEY_ARE = "16-bit"
WAYS = (AS_THEY_ARE, "int8", "mixed", "nf4")


def check_resting(resting: str | None, method: Method, shared: bool) -> str | None:
    """Return how matrices rest, None: as they are; raises InputError where they cannot rest so."""
    if resting in (None, AS_THEY_ARE):
        return None
    if resting not in WAYS:
        raise unknown_name("way to rest", resting, WAYS)
    if method.form != "low-rank":
        raise InputError(
            f"resting={resting!r} is for methods that train layers through slots, and {method.name!r} does not; use "
            "OwLore or GaLore, or leave resting out."
        )
    if method.get("master", "none") != "none":
        raise InputError(
            f"master={method.get('master', 'none')!r} is beside weights that rest in 16 bits; leave one out."
        )
    if shared:
        raise InputError(f"resting={resting!r} is for one process, and this one has others; leave it out.")
    return resting


class Kinds:
    """In what each matrix rests: "mixed" has those in 8 bits that lose most in 4.

    In a block these are the ones with the most inputs, which lead its widest activations back: of what NF4 costs a
    pretrained SmolLM2 before it trains they make nearly half. An output layer, whose errors reach the loss as they are,
    rests in 8 bits always.
    """

    of_head = "int8"

    def __init__(self, resting: str, survey: Survey) -> None:
        self.resting = resting
        self._kinds: Mapping[nn.Module, str] = {}
        if resting == "mixed":
            self._kinds = {
                place.layer: "int8" if linear_shape(place.layer)[1] == widest else "nf4"
                for plan in survey.drawn
                for widest in [max((linear_shape(place.layer)[1] for place in plan.places), default=0)]
                for place in plan.places
            }

    def of(self, layer: nn.Module) -> str:
        """Return "int8" or "nf4" for a linear layer of a block."""
        return self._kinds.get(layer, self.resting)
