"""What `bench.pretrained` tries beside the methods of the package: changes of them that are no settings there.

Each stands here as it was measured, whatever came of it; bench/LOG.md says which were kept.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lisa_kernels import GaLore, OwLore
from lisa_kernels.layers import SlotModule
from lisa_kernels.methods.sampled_adamw import SampledAdamW
from lisa_kernels.methods.slots import stagger
from lisa_kernels.methods.units import Unit

# Directions by which ranks grow.
STEP = 4


def _set_rank(layer: SlotModule, rank: int) -> None:
    """Give a layer whose slot is empty another rank, at most what its shape allows."""
    assert layer.tracker is not None
    assert not layer.active
    layer.rank = layer.tracker.rank = min(rank, layer.out_features, layer.in_features)


class FlooredAdamW(SampledAdamW):
    """Trains every layer: the drawn ones in `above` directions, the others in `floor`, moments fresh at a switch."""

    def _active_units(self) -> list[Unit]:
        return self.layout.units()

    def _switch_to(self, layers: list[int]) -> None:
        known = bool(self._active)
        drawn = {index: self.layout.drawn[index] for index in layers if index not in self._active}
        resting = {
            index: self.layout.drawn[index]
            for index in self.layout.drawable
            if index not in layers and (index in self._active or not known)
        }
        for unit in drawn.values():
            self._begin(unit, self.method.get("above", 0))
        super()._switch_to(layers)
        for unit in resting.values():
            self._begin(unit, self.method.get("floor", 0))
            for layer in unit.lowrank.values():
                layer.activate()
                assert layer.tracker is not None
                layer.tracker.start(self.calls)
        stagger(self._active_slots())
        self._arm()

    def _begin(self, unit: Unit, rank: int) -> None:
        self.retire(layer.slot for layer in unit.lowrank.values())
        for layer in unit.lowrank.values():
            layer.deactivate()
            _set_rank(layer, rank)


@dataclass(frozen=True)
class FlooredOwLore(OwLore):
    """OwLore whose resting layers learn too, in `floor` directions; the drawn ones in `above`, or all there are."""

    optimizer: ClassVar[type | None] = FlooredAdamW
    above: int = 128
    floor: int = 8


class WeighedAdamW(SampledAdamW):
    """Multiplies the updates of a layer's matrices by the mean probability of a draw over its own.

    So that, summed over many draws, no layer moves farther for being drawn more often. A slot is zero when it is read:
    a factor on it is one on Adam's updates only.
    """

    def _switch_to(self, layers: list[int]) -> None:
        assert self.sampler is not None
        chances = self.sampler.inclusion_probabilities()
        for place, index in enumerate(self.layout.drawable):
            for layer in self.layout.drawn[index].lowrank.values():
                layer.scale = statistics.mean(chances) / chances[place]
        super()._switch_to(layers)


@dataclass(frozen=True)
class WeighedOwLore(OwLore):
    """OwLore with importance weights for unequal probabilities."""

    optimizer: ClassVar[type | None] = WeighedAdamW


class WarmedAdamW(SampledAdamW):
    """Begins a drawn layer's matrices at a part of the rate: a half at its first step for `warm_up` = 2, then all."""

    def _before_update(self) -> None:
        super()._before_update()
        for index in self._active:
            for layer in self.layout.drawn[index].lowrank.values():
                assert layer.tracker is not None
                layer.scale = min(1.0, (layer.tracker.steps + 1) / self.method.get("warm_up", 1))

    def _arm(self) -> None:
        for layer in self._layers().values():
            layer.scale = 1.0
        super()._arm()


@dataclass(frozen=True)
class WarmedOwLore(OwLore):
    """OwLore with a warm-up after each switch."""

    optimizer: ClassVar[type | None] = WarmedAdamW
    warm_up: int = 3


class GentleAdamW(SampledAdamW):
    """Takes a quarter of the rate for embedding and output layer."""

    def _begin_period(self) -> None:
        for layer in self.layout.always.lowrank.values():
            layer.scale = 0.25
        super()._begin_period()


@dataclass(frozen=True)
class GentleOwLore(OwLore):
    """OwLore whose embeddings go slower."""

    optimizer: ClassVar[type | None] = GentleAdamW


@dataclass(frozen=True)
class GentleGaLore(GaLore):
    """GaLore whose embeddings go slower."""

    optimizer: ClassVar[type | None] = GentleAdamW


class RankedAdamW(SampledAdamW):
    """Gives each matrix the rank that its method names by the matrix's path."""

    def _switch_to(self, layers: list[int]) -> None:
        ranks = dict(self.method.get("ranks", ()))
        for unit in self.layout.drawn:
            for path, layer in unit.lowrank.items():
                if not layer.active:
                    _set_rank(layer, ranks.get(path, layer.rank))
        super()._switch_to(layers)


@dataclass(frozen=True)
class RankedGaLore(GaLore):
    """GaLore with a rank for each matrix."""

    optimizer: ClassVar[type | None] = RankedAdamW
    ranks: tuple[tuple[str, int], ...] = ()


def by_spectrum(method: RankedGaLore, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> RankedGaLore:
    """Return the method with its ranks shared out by the spectra of the first gradients, at the same bytes in all.

    The next directions go to the matrix where they hold the largest share of its gradient's energy for what they cost,
    m + n numbers a direction.
    """
    for batch in batches:
        model(**batch).loss.backward()
    matrices = {
        path: layer.weight
        for path, layer in model.get_submodule("model.layers").named_modules(prefix="model.layers")
        if isinstance(layer, nn.Linear)
    }
    spectra = {path: torch.linalg.svdvals(weight.grad).square() for path, weight in matrices.items()}
    model.zero_grad()
    ranks = share_out({path: found / found.sum() for path, found in spectra.items()},
                      {path: sum(weight.shape) for path, weight in matrices.items()}, method.rank)  # fmt: skip
    return replace(method, ranks=tuple(ranks.items()))


def share_out(energies: Mapping[str, Tensor], costs: Mapping[str, int], rank: int) -> dict[str, int]:
    """Return a rank for each, costing as much as `rank` for all; energies: descending shares of each direction."""
    left = rank * sum(costs.values())
    ranks: dict[str, int] = dict.fromkeys(energies, 0)

    def gain(name: str) -> float:
        return float(energies[name][ranks[name] : ranks[name] + STEP].sum()) / costs[name]

    waiting = [(-gain(name), name) for name in energies]
    heapq.heapify(waiting)
    while waiting:
        _, name = heapq.heappop(waiting)
        if left < STEP * costs[name] or ranks[name] + STEP > len(energies[name]):
            continue
        ranks[name], left = ranks[name] + STEP, left - STEP * costs[name]
        heapq.heappush(waiting, (-gain(name), name))
    return {name: max(found, STEP) for name, found in ranks.items()}
