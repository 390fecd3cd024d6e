"""How matrices rest where a model computes: what may be asked for, and in how many bits each matrix is then."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.layers import find_linears, linear_shape, output_layer, untied
from lisa_kernels.layers.linears import Place
from lisa_kernels.methods.active_on import draws
from lisa_kernels.methods.definitions import Method
from lisa_kernels.methods.outer_slots import find_still_outer
from lisa_kernels.methods.precision import (
    AS_THEY_ARE,
    MIXED,
    CodeLoss,
    bytes_at_rest,
    is_picked,
    is_size,
    least_bytes,
    losses_by_place,
    pick_kinds,
)
from lisa_kernels.methods.survey import Survey
from lisa_kernels.sizes import parse_size

WAYS = (AS_THEY_ARE, "int8", MIXED, "nf4")
ON_DEVICE, ON_HOST = "device", "host"


def check_resting(resting: str | None, method: Method, shared: bool) -> str | None:
    """Return how matrices rest, None: as they are; raises InputError where they cannot rest so."""
    if resting in (None, AS_THEY_ARE):
        return None
    if not isinstance(resting, str) or not (resting in WAYS or is_size(resting)):
        raise unknown_name("way to rest", str(resting), (*WAYS, "a size such as 5.5GB"))
    if is_size(resting):
        parse_size(resting)
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


def check_device(device: torch.device | str | None, resting: str | None) -> torch.device | None:
    """Return where a model whose weights rest is to compute, None: where it is; `resting` as `check_resting` has it."""
    if device is None:
        return None
    if resting is None:
        raise InputError(
            f"device={str(device)!r} is for a model whose weights are to rest, and these are in 16 bits; call "
            "model.to(device) before it is attached."
        )
    return torch.device(device)


def check_resting_where(where: str | os.PathLike[str] | None, resting: str | None) -> str:
    """Return where the codes of the blocks are between uses, ON_DEVICE, ON_HOST or a folder, which need not be there.

    Raises InputError for what is no such place.
    """
    if where is None:
        return ON_DEVICE
    if not isinstance(where, (str, os.PathLike)) or not os.fspath(where):
        raise InputError(f"resting_where is {where!r}; {ON_DEVICE!r}, {ON_HOST!r} or a folder is wanted.")
    where = os.fspath(where)
    if where != ON_DEVICE and resting in (None, AS_THEY_ARE):
        raise InputError(
            f"resting_where={where!r} is for weights that rest in 8 or 4 bits; give resting, such as 'nf4', too."
        )
    return where


@dataclass(frozen=True)
class Rest:
    """How the matrices of a model are to rest, checked; see `attach`.

    way: "int8", "nf4", "mixed" or a size; losses: by which the last two are filled, None: by what is known without.
    where: codes are, see `check_resting_where`. on_masters: whether drawn layers are on the device in 16 bits while
    they train. device: where the model computes then, None: where it is.
    """

    way: str
    where: str = ON_DEVICE
    on_masters: bool = False
    losses: Mapping[nn.Module, CodeLoss] | None = None
    device: torch.device | None = None


class Kinds:
    """In what each matrix rests: "mixed" has those in 8 bits that lose most in 4.

    Without values these are, in a block, the ones with the most inputs, which lead its widest activations back: of what
    NF4 costs a pretrained SmolLM2 before it trains they make nearly half. An output layer, whose errors reach the loss
    as they are, rests in 8 bits, but by a size that has not so many. A size is filled by what is lost, see
    `pick_kinds`. losses: measured, by which as many bytes are given to others then; None: as far as they are known
    without values, as a plan has it, which nothing that is measured takes more than. of_head: "int8" or "nf4", of the
    output layer. nbytes: of all codes and scales, which a size bounds.
    """

    def __init__(self, resting: str, survey: Survey, losses: Mapping[nn.Module, CodeLoss] | None = None) -> None:
        self.resting = resting
        self.still = still_places(survey)
        places = [*survey.places(), *self.still]
        head = output_layer(survey.model)
        rests = head is not None and (head in {place.layer for place in places} or _rests_outside(survey))
        layers = raised_layers(survey, places)
        self.of_head, beside = "int8", 0
        if head is not None and rests:
            if is_size(resting) and parse_size(resting) < least_bytes(layers) + bytes_at_rest(head, "int8"):
                self.of_head = "nf4"
            beside = bytes_at_rest(head, self.of_head)
        self._kinds: dict[nn.Module, str] = {}
        if resting == MIXED:
            self._kinds = _by_width(survey.path, places)
        elif is_size(resting):
            self._kinds = pick_kinds(layers, resting, beside, losses_by_place(_by_block(survey.path, places)))
        if losses and is_picked(resting):
            self._kinds = pick_kinds(layers, str(self._nbytes(layers, beside)), beside, losses)
        if head is not None:
            self._kinds[head] = self.of_head
        self.nbytes = self._nbytes(layers, beside)

    def _nbytes(self, layers: Iterable[nn.Module], beside: int) -> int:
        return beside + sum(bytes_at_rest(layer, self.of(layer)) for layer in layers)

    def of(self, layer: nn.Module) -> str:
        """Return "int8" or "nf4" for a linear layer."""
        return self._kinds.get(layer, self.resting)


def raised_layers(survey: Survey, places: Iterable[Place] | None = None) -> list[nn.Module]:
    """Return the linears that rest in as many bits as a size has room for: all that rest but the output layer."""
    places = [*survey.places(), *still_places(survey)] if places is None else places
    head = output_layer(survey.model)
    return [layer for layer in dict.fromkeys(place.layer for place in places) if layer is not head]


def _rests_outside(survey: Survey) -> bool:
    """Return whether the output layer rests without a place in the blocks: with a slot of its own, or for good."""
    outer = survey.outer
    if outer is None and survey.method.embeddings_rest:
        outer = find_still_outer(survey.model)
    return outer is not None and bool(outer.head)


def blocks_at_rest(survey: Survey) -> list[nn.Module]:
    """Return the blocks whose linears rest, those of adapters too; none where none were found."""
    found: Any = survey.model.get_submodule(survey.path) if survey.path else ()
    return list(found)


def still_places(survey: Survey) -> list[Place]:
    """Return the linears of the blocks that carry no slot and whose weight nobody else reads: they rest too."""
    taken = {place.layer for place in survey.places()}
    roots = {f"{survey.path}.{number}": block for number, block in enumerate(blocks_at_rest(survey))}
    return untied(survey.model, find_linears(roots, 0, lambda path, layer: layer not in taken))


def _by_block(path: str, places: Iterable[Place]) -> dict[int | None, list[nn.Module]]:
    """Return the layers of each block by its number; under None those that are in no block."""
    blocks: dict[int | None, list[nn.Module]] = defaultdict(list)
    for place in places:
        inside = place.path.removeprefix(f"{path}.") if path else place.path
        blocks[None if inside == place.path else int(inside.partition(".")[0])].append(place.layer)
    return blocks


def _by_width(path: str, places: Iterable[Place]) -> dict[nn.Module, str]:
    """Return the kind of each layer: of a block "int8" for those with the most inputs, "nf4" for all others."""
    blocks = _by_block(path, places)
    kinds = dict.fromkeys(blocks.pop(None, []), "nf4")
    for layers in blocks.values():
        kinds |= dict.fromkeys(layers, "nf4")
        widest = max(linear_shape(layer)[1] for layer in layers)
        kinds |= {layer: "int8" for layer in layers if linear_shape(layer)[1] == widest}
    return kinds
