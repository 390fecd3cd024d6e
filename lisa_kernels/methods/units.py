"""The units that a method switches on and off: each block, and what stands around the blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from lisa_kernels.basis import BasisTracker
from lisa_kernels.errors import InputError
from lisa_kernels.layers import (
    LowRankLinear,
    ModelParts,
    SlotModule,
    TappedEmbedding,
    check_untied,
    find_linears,
    split_model,
    swap_linears,
)
from lisa_kernels.layers.linears import Place
from lisa_kernels.layers.lowrank import Swap
from lisa_kernels.methods.definitions import Method
from lisa_kernels.methods.outer_slots import add_outer_slots, find_outer

# Steps between two refreshes of a basis, for methods that only have embedding and head in low rank.
DEFAULT_GAP = 200


@dataclass
class Unit:
    """Something that is active as a whole: parameters trained at full rank, and layers trained through their slots."""

    name: str
    full: list[nn.Parameter] = field(default_factory=list)
    lowrank: dict[str, SlotModule] = field(default_factory=dict)

    def params(self) -> list[nn.Parameter]:
        """Return all parameters that train while the unit is active."""
        return self.full + [layer.slot for layer in self.lowrank.values()]


@dataclass
class Layout:
    """A model prepared for a method: the units in the draw, the one that always trains, and what was swapped."""

    drawn: list[Unit]
    always: Unit
    swaps: list[Swap | TappedEmbedding]
    path: str

    def units(self) -> list[Unit]:
        """Return every unit, the drawn ones first."""
        return [*self.drawn, self.always]


def distinct(params: Iterable[nn.Parameter], taken: set[int]) -> list[nn.Parameter]:
    """Return the parameters not yet in `taken`, and take them: a tied tensor belongs to one unit only."""
    fresh = []
    for param in params:
        if id(param) not in taken:
            taken.add(id(param))
            fresh.append(param)
    return fresh


def swapped(swaps: list[Swap], root: str, taken: set[int]) -> dict[str, LowRankLinear]:
    """Return the new layers under one root by path, and take slots and weights; one in several places comes once."""
    layers = {}
    for swap in swaps:
        if swap.root == root and distinct([swap.layer.slot], taken):
            layers[swap.path] = swap.layer
            taken.add(id(swap.layer.weight))
    return layers


def _block_unit(name: str, block: nn.Module, swaps: list[Swap], taken: set[int]) -> Unit:
    lowrank = swapped(swaps, name, taken)
    return Unit(name, distinct(block.parameters(), taken), {**lowrank})


def _layered_places(model: nn.Module, method: Method, parts: ModelParts) -> list[Place]:
    """Return the linears that get a slot.

    Refuses more active layers than there are, a rank that does not fit, and a weight that another module uses too.
    """
    wanted, layers = method.get("active_layers", 1), len(parts.blocks)
    if wanted > layers:
        raise InputError(f"active_layers is {wanted}, but the model has {layers} layers; use at most {layers}.")
    if method.form != "low-rank":
        return []
    roots = {f"{parts.path}.{index}": block for index, block in enumerate(parts.blocks)}
    places = find_linears(roots, method.get("rank", 0))
    check_untied(model, places, "whose gradient a low-rank slot would not see; untie the two, or use LISA or OWS")
    return places


def check_layered_layout(model: nn.Module, method: Method, blocks: str | None) -> None:
    """Raise what `layered_layout` would raise, and change nothing."""
    parts = split_model(model, blocks)
    _layered_places(model, method, parts)
    if method.get("embeddings", "always") == "low-rank":
        find_outer(model, parts)


def layered_layout(model: nn.Module, method: Method, seed: int, blocks: str | None) -> Layout:
    """Prepare a model whose decoder blocks are switched (or, without a sampler, all active)."""
    parts = split_model(model, blocks)
    rank, gap, made = method.get("rank", 0), method.get("gap", DEFAULT_GAP), 0

    def make_tracker(rank: int) -> BasisTracker:
        nonlocal made
        made += 1
        return BasisTracker(rank=rank, gap=gap, offset=0, seed=seed, stream=made)

    def make(layer: nn.Module, path: str) -> LowRankLinear:
        return LowRankLinear(layer, rank, tracker=make_tracker(rank))

    swaps = swap_linears(_layered_places(model, method, parts), make)
    taken: set[int] = set()
    drawn = [_block_unit(f"{parts.path}.{i}", block, swaps, taken) for i, block in enumerate(parts.blocks)]
    layout = Layout(drawn, Unit("always"), [*swaps], parts.path)
    embeddings = method.get("embeddings", "always")
    if embeddings == "low-rank":
        layout.always.lowrank, heads, taps = add_outer_slots(find_outer(model, parts), rank, make_tracker)
        layout.swaps += [*heads, *taps]
        taken.update(id(layer.weight) for layer in layout.always.lowrank.values())
    if embeddings == "sampled":
        layout.drawn += _outer_units(parts, taken)
    elif embeddings != "frozen":
        layout.always.full = distinct(parts.outer, taken)
    return layout


def _outer_units(parts: ModelParts, taken: set[int]) -> list[Unit]:
    """Return embedding and head as units of their own; one where the head is tied and only a norm is left of it."""
    if not any(param.dim() >= 2 for param in parts.head):
        return [Unit("embeddings", distinct(parts.outer, taken))]
    return [
        Unit(name, distinct(getattr(parts, name), taken)) for name in ("embeddings", "head") if getattr(parts, name)
    ]
