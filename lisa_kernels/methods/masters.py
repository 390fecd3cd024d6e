"""Where the masters of weights at rest are: in host memory, or in files that are mapped."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.layers import AccumulatingSlot
from lisa_kernels.methods.outer_slots import find_still_outer
from lisa_kernels.methods.own_files import OwnFiles
from lisa_kernels.methods.resting import Kinds
from lisa_kernels.methods.survey import Survey, UnitPlan
from lisa_kernels.paging.masters import MasterFolder

IN_MEMORY = "host"


def check_masters(masters: str | os.PathLike[str] | None, resting: str | None) -> str | None:
    """Return the folder of the masters, None: they are in host memory; `resting` as `check_resting` returns it."""
    if masters is None or masters == IN_MEMORY:
        return None
    if not isinstance(masters, (str, os.PathLike)) or not os.fspath(masters):
        raise InputError(f"masters is {masters!r}; 'host' or a folder is wanted.")
    if resting is None:
        raise InputError(
            f"masters={os.fspath(masters)!r} is for weights that rest in 8 or 4 bits, and these are in 16; give "
            "resting='int8' or 'nf4', or leave masters out."
        )
    return os.fspath(masters)


class Masters:
    """Keeps each master in the file that the model was loaded from, as long as it is what that says, else in a folder.

    Raises InputError where the folder cannot be had, before anything is changed.
    """

    def __init__(self, survey: Survey, resting: str, folder: str) -> None:
        self._own = OwnFiles(survey.model)
        self.folder = MasterFolder(folder, wanted_bytes(survey, resting))

    @property
    def bytes_written(self) -> int:
        """How many bytes went to the disk so far."""
        return self.folder.bytes_written

    def keep(self, layer: AccumulatingSlot, path: str) -> None:
        """Move a layer's master to where it is kept; path: the layer's."""
        weight = layer.stored_weight
        file = self.folder.file(f"{path}.weight", weight.dtype, weight.shape)
        found = self._own.find(weight)
        if found is not None:
            file.borrow(found.place, found.stamp)
        layer.move_to(file, None if found is None else found.mapped)

    def close(self) -> None:
        """Delete the folder's files; weights that are mapped from there stay readable."""
        self.folder.close()


def wanted_bytes(survey: Survey, resting: str) -> int:
    """Return the most bytes that the folder holds: every master, one more while it is written, and what is saved.

    A state of the model has the layers that train with what they have learnt, which is written aside for it.
    """
    each: dict[int, int] = {id(weight): weight.nbytes for weight in _masters(survey, resting)}
    outer: int = sum(weight.nbytes for weight in ([] if survey.outer is None else survey.outer.weights()))
    units = sorted((_bytes(unit) for unit in survey.drawn), reverse=True)
    active: int = survey.method.get("active_layers", len(units))
    return sum(each.values()) + max(each.values(), default=0) + outer + _bytes(survey.always) + sum(units[:active])


def _masters(survey: Survey, resting: str) -> list[Any]:
    outer = survey.outer
    if outer is None and survey.method.embeddings_rest:
        outer = find_still_outer(survey.model)
    places = [*survey.places(), *Kinds(resting, survey).still]
    return [*(place.layer.weight for place in places), *([] if outer is None else outer.weights())]


def _bytes(unit: UnitPlan) -> int:
    weights: set[nn.Parameter] = {place.layer.weight for place in unit.places}  # type: ignore[misc]
    return sum(weight.nbytes for weight in weights)
