"""How matrices rest where a model computes: what may be asked for, and in how many bits each matrix is then."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import nn

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.layers import find_linears, linear_shape, untied
from lisa_kernels.layers.linears import Place
from lisa_kernels.methods.active_on import draws
from lisa_kernels.methods.definitions import Method
from lisa_kernels.methods.survey import Survey

AS_THEY_ARE = "16-bit"
WAYS = (AS_THEY_ARE, "int8", "mixed", "nf4")
PLACES = ("device", "host")


def check_resting(resting: str | None, method: Method, shared: bool) -> str | None:
    """Return how matrices rest, None: as they are; raises InputError where they cannot rest so."""
    if resting in (None, AS_THEY_ARE):
        return None
    if resting not in WAYS:
        raise unknown_name("way to rest", resting, WAYS)
    if method.form not in ("low-rank", "adapter") and not draws(method):
        raise InputError(
            f"resting={resting!r} is for methods that train layers through slots or adapters, or draw them, and "
            f"{method.name!r} does neither; use LoRA, OwLore, GaLore or LISA, or leave resting out."
        )
    if method.get("master", "none") != "none":
        raise InputError(
            f"master={method.get('master', 'none')!r} is beside weights that rest in 16 bits; leave one out."
        )
    if shared:
        raise InputError(f"resting={resting!r} is for one process, and this one has others; leave it out.")
    return resting


def check_resting_where(where: str | None, resting: str | None) -> str:
    """Return where the codes of the blocks are between uses; raises InputError for a place that is none."""
    if where is not None and where not in PLACES:
        raise unknown_name("place to rest", where, PLACES)
    if where not in (None, "device") and resting in (None, AS_THEY_ARE):
        raise InputError(
            f"resting_where={where!r} is for weights that rest in 8 or 4 bits; give resting, such as 'nf4', too."
        )
    return where or "device"


class Kinds:
    """In what each matrix rests: "mixed" has those in 8 bits that lose most in 4.

    In a block these are the ones with the most inputs, which lead its widest activations back: of what NF4 costs a
    pretrained SmolLM2 before it trains they make nearly half. An output layer, whose errors reach the loss as they are,
    rests in 8 bits always.
    """

    of_head = "int8"

    def __init__(self, resting: str, survey: Survey) -> None:
        self.resting = resting
        self.still = _still_places(survey)
        self._kinds: dict[nn.Module, str] = {}
        if resting == "mixed":
            self._kinds = _by_width(survey, [*survey.places(), *self.still])
        get_output = getattr(survey.model, "get_output_embeddings", None)
        if callable(get_output) and isinstance(head := get_output(), nn.Module):
            self._kinds[head] = self.of_head

    def of(self, layer: nn.Module) -> str:
        """Return "int8" or "nf4" for a linear layer."""
        return self._kinds.get(layer, self.resting)


def _still_places(survey: Survey) -> list[Place]:
    """Return the linears of the blocks that carry no slot and whose weight nobody else reads: they rest too."""
    taken = {place.layer for place in survey.places()}
    if not survey.path:
        return []
    blocks: Any = survey.model.get_submodule(survey.path)
    roots = {f"{survey.path}.{number}": block for number, block in enumerate(blocks)}
    return untied(survey.model, find_linears(roots, 0, lambda path, layer: layer not in taken))


def _by_width(survey: Survey, places: Iterable[Place]) -> dict[nn.Module, str]:
    """Return the kind of each layer: of a block "int8" for those with the most inputs, "nf4" for all others."""
    kinds: dict[nn.Module, str] = {}
    blocks: dict[str, list[nn.Module]] = defaultdict(list)
    for place in places:
        kinds[place.layer] = "nf4"
        if survey.path and place.path.startswith(f"{survey.path}."):
            blocks[place.path.removeprefix(f"{survey.path}.").partition(".")[0]].append(place.layer)
    for layers in blocks.values():
        widest = max(linear_shape(layer)[1] for layer in layers)
        kinds |= {layer: "int8" for layer in layers if linear_shape(layer)[1] == widest}
    return kinds
