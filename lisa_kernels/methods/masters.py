"""Where the masters of weights at rest are: in host memory, or in files that are mapped."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.layers import AccumulatingSlot
from lisa_kernels.methods.outer_slots import find_still_outer
from lisa_kernels.methods.own_files import OwnFiles
from lisa_kernels.methods.resting import still_places
from lisa_kernels.methods.survey import Survey, UnitPlan
from lisa_kernels.paging.masters import MasterFile, MasterFolder

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


class MasterKeeper(Protocol):
    """What moves each master to where it is kept; see `Masters`."""

    @property
    def bytes_written(self) -> int:
        """How many bytes went to the disk so far."""

    def keep(self, layer: AccumulatingSlot, path: str) -> None:
        """Move a layer's master to where it is kept; path: the layer's."""

    def files(self) -> dict[str, Path]:
        """Return the file of each master that has one to itself and is what the model would save, by its name."""

    def close(self) -> None:
        """Delete what was written; weights that are mapped from there stay readable."""


class Masters:
    """Keeps each master in the file that the model was loaded from, as long as it is what that says, else in a folder.

    Raises InputError where the folder cannot be had, before anything is changed.
    """

    def __init__(self, survey: Survey, folder: str) -> None:
        self._own = OwnFiles(survey.model)
        self._kept: list[tuple[AccumulatingSlot, MasterFile]] = []
        self.folder = MasterFolder(folder, MasterBytes.of(survey).wanted)

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
        self._kept.append((layer, file))

    def files(self) -> dict[str, Path]:
        """Return the file of each master that has one to itself and is what the model would save, by its name.

        Without those of tied weights, which have several names.
        """
        return {
            file.name: file.path
            for layer, file in self._kept
            if file.path is not None
            and layer.is_mapped
            and not layer.is_adapter
            and self._own.names_of(layer.stored_weight) == [file.name]
        }

    def close(self) -> None:
        """Delete the folder's files; weights that are mapped from there stay readable."""
        self.folder.close()


@dataclass(frozen=True)
class MasterBytes:
    """What masters take: all of them, those that train at a time, and of these the ones that are drawn.

    wanted: the most that their folder holds, with one more of the largest while it is written, and what a state of the
    model has of layers that train, which is written aside for it.
    """

    all: int
    largest: int
    active: int
    drawn: int

    @property
    def wanted(self) -> int:
        """The most bytes on the disk."""
        return self.all + self.largest + self.active

    @classmethod
    def of(cls, survey: Survey) -> MasterBytes:
        """Return that of a model whose matrices are to rest."""
        outer = survey.outer
        still = find_still_outer(survey.model) if outer is None and survey.method.embeddings_rest else None
        around = [weight for places in (outer, still) if places is not None for weight in places.weights()]
        linears = [place.layer.weight for place in (*survey.places(), *still_places(survey))]
        each: dict[int, int] = {id(weight): _size(weight) for weight in (*linears, *around)}

        def size_of(weights: Iterable[Any]) -> int:
            return sum(each.get(number, 0) for number in {id(weight) for weight in weights})

        # What trains at full rank does so on masters as well.
        units = sorted((size_of(_weights(unit)) for unit in survey.drawn), reverse=True)
        drawn = sum(units[: survey.method.get("active_layers", len(units))])
        active = drawn + size_of([] if outer is None else outer.weights()) + size_of(_weights(survey.always))
        return cls(size_of([*linears, *around]), max(each.values(), default=0), active, drawn)


def _weights(unit: UnitPlan) -> set[nn.Parameter]:
    places: set[nn.Parameter] = {place.layer.weight for place in unit.places}  # type: ignore[misc]
    return places | set(unit.full)


def _size(weight: Any) -> int:
    return int(weight.numel() * weight.element_size())
