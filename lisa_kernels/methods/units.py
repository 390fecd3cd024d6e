"""The units that a method switches on and off, made as a survey says: from here on the model is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lisa_kernels.basis import BasisTracker, RandomRows, random_basis
from lisa_kernels.layers import (
    AccumulatingSlot,
    LowRankEmbedding,
    LowRankLinear,
    RestingLinear,
    RestingTrainedBasisLinear,
    SlotModule,
    TappedEmbedding,
    TrainedBasisLinear,
    WokenLinear,
    linear_shape,
    swap_linears,
)
from lisa_kernels.layers.codes_home import CodesHome
from lisa_kernels.layers.lowrank import Swap
from lisa_kernels.methods.definitions import LoRA
from lisa_kernels.methods.masters import MasterKeeper
from lisa_kernels.methods.outer_slots import add_outer_slots, find_still_outer
from lisa_kernels.methods.resting import ON_DEVICE, Kinds, Rest
from lisa_kernels.methods.streaming import StreamedHomes
from lisa_kernels.methods.survey import Survey, UnitPlan
from lisa_kernels.paging.master_copies import MasterCopies
from lisa_kernels.paging.streamed import StreamedPages

# Steps between two refreshes of a basis, for methods that only have embedding and head in low rank.
DEFAULT_GAP = 200


@dataclass
class Unit:
    """Something that is active as a whole: parameters trained at full rank, and layers trained through their slots.

    taps: what leads the gradients of lookups into a slot of its own or another unit's, while this one is active.
    woken: the layers at rest that train on their masters.
    """

    name: str
    full: list[nn.Parameter] = field(default_factory=list)
    lowrank: dict[str, SlotModule] = field(default_factory=dict)
    woken: list[WokenLinear] = field(default_factory=list)
    taps: list[TappedEmbedding] = field(default_factory=list)

    def params(self) -> list[nn.Parameter]:
        """Return all parameters that train while the unit is active."""
        return self.full + [param for layer in self.lowrank.values() for param in layer.trained]

    def masters(self) -> list[nn.Parameter]:
        """Return the weights that are on the device while the unit is active, and at home otherwise."""
        return [layer.stored_weight for layer in self.woken]

    def rest_lookups(self, rests: bool) -> None:
        """Leave the lookups that train with this unit out of their slot's gradient, or take them in again."""
        for tap in self.taps:
            tap.rest(rests)

    def arm(self) -> None:
        """Settle which layers' backwards find a basis until the next step, and tell all whether any of them does."""
        for layer in self.lowrank.values():
            layer.arm()
        capturing = any(layer.capturing for layer in self.lowrank.values())
        for layer in self.lowrank.values():
            layer.beside_capturing = capturing


@dataclass
class Layout:
    """A model prepared for a method: the units that have a number, the one that always trains, and what was swapped.

    drawable: the numbers of the units that can be drawn; the others were frozen whole before. with_first: what is
    active while unit 0 is and has no number of its own. below: whether every backward reaches below the blocks.
    resting: how matrices rest, None: as they are. streamed: the pages of those whose codes are not on the device.
    masters: what keeps theirs in files, None: they are in host memory. on_masters: whether drawn ones compute on their
    masters. copies: of masters on their way.
    """

    drawn: list[Unit]
    always: Unit
    swaps: list[Swap | TappedEmbedding]
    drawable: list[int]
    with_first: Unit | None = None
    below: bool = False
    resting: str | None = None
    streamed: StreamedPages | None = None
    masters: MasterKeeper | None = None
    on_masters: bool = False
    copies: MasterCopies = field(default_factory=MasterCopies)

    def units(self) -> list[Unit]:
        """Return every unit, the drawn ones first."""
        return [*self.drawn, *([self.with_first] if self.with_first else []), self.always]

    def units_of(self, layers: Iterable[int]) -> list[Unit]:
        """Return the units that are active because those with these numbers are."""
        numbers = list(layers)
        beside = [self.with_first] if self.with_first and 0 in numbers else []
        return [*(self.drawn[number] for number in numbers), *beside]


class _SlotMaker:
    """Makes the layers with slots of one model, each with random numbers of its own."""

    def __init__(self, survey: Survey, seed: int, rest: Rest | None, masters: MasterKeeper | None) -> None:
        self.masters, self.copies = masters, MasterCopies()
        self.method, self.seed, self.made = survey.method, seed, 0
        self.on_masters = rest is not None and rest.on_masters
        self.device = None if rest is None else rest.device
        self.kinds = None if rest is None else Kinds(rest.way, survey, rest.losses)
        where = ON_DEVICE if rest is None else rest.where
        streams = self.kinds is not None and where != ON_DEVICE
        self.homes = StreamedHomes(survey, self.kinds, where) if streams and self.kinds is not None else None
        # What trains at full rank while it is drawn.
        self.full = {param for plan in survey.drawn for param in plan.full}

    def tracker(self, rank: int) -> BasisTracker:
        self.made += 1
        gap = self.method.get("gap", DEFAULT_GAP)
        return BasisTracker(rank=rank, gap=gap, offset=0, seed=self.seed, stream=self.made)

    def layer(self, original: nn.Module, path: str) -> LowRankLinear:
        rank, adapts = self.method.get("rank", 0), self.method.form == "adapter"
        tracker = None if adapts else self.tracker(rank)
        scale = self.method.get("alpha", 1.0) / rank if adapts else 1.0
        trains_basis = isinstance(self.method, LoRA)
        if self.kinds is None:
            layer = (TrainedBasisLinear if trains_basis else LowRankLinear)(original, rank, scale, tracker)
        else:
            resting = RestingTrainedBasisLinear if trains_basis else WokenLinear if self.on_masters else RestingLinear
            layer = resting(original, rank, self.kinds.of(original), tracker, path, scale, self.codes_home(original))
            self.keep(layer, path)
        if adapts:
            layer.activate(self._random_basis(layer))
        return layer

    def still(self, original: nn.Module, path: str) -> LowRankLinear:
        """Return a layer that rests and whose slot is never active; its weight may train itself."""
        assert self.kinds is not None
        kind, home = self.kinds.of(original), self.codes_home(original)
        if self.on_masters and original.weight in self.full:
            layer: RestingLinear = WokenLinear(original, 0, kind, None, path, codes_home=home)
        else:
            rank = min(max(1, self.method.get("rank", 1)), *linear_shape(original))
            layer = RestingLinear(original, rank, kind, self.tracker(rank), path, codes_home=home)
        self.keep(layer, path)
        return layer

    def keep(self, layer: SlotModule, path: str) -> None:
        """Move the layer's master, if it has one, to where masters are kept, and all else to where it computes."""
        if isinstance(layer, AccumulatingSlot):
            layer.share(self.copies)
            if self.masters is not None:
                self.masters.keep(layer, path)
        if self.device is not None:
            layer.to(self.device)

    def codes_home(self, original: nn.Module) -> CodesHome | None:
        """Return where a layer's codes are, None: where it computes."""
        return None if self.homes is None else self.homes.of(original)

    def _random_basis(self, layer: LowRankLinear) -> Tensor:
        self.made += 1
        source = RandomRows(self.seed, self.made)
        if isinstance(layer, TrainedBasisLinear):
            # The spread of LoRA's own start, uniform on ±1/√n.
            return source.draw(layer.rank, layer.in_features, layer.slot.device) * 3**-0.5
        return random_basis(layer.rank, layer.in_features, source, layer.slot.device)


def make_layout(
    survey: Survey, seed: int = 0, rest: Rest | None = None, masters: MasterKeeper | None = None
) -> Layout:  # fmt: skip
    """Do to the model what the survey found possible.

    rest: how matrices rest, None: as they are. masters: what keeps theirs in files, closed where this fails; None: they
    are in host memory. When something cannot be done, nothing is: masters too are where they were.
    """
    homes = {param: param.device for param in survey.model.parameters()}
    changes: list[Swap | TappedEmbedding] = []
    maker: _SlotMaker | None = None
    try:
        maker = _SlotMaker(survey, seed, rest, masters)
        return _make_layout(survey, maker, changes)
    except BaseException:
        for change in reversed(changes):
            change.undo()
        if masters is not None:
            masters.close()
        if maker is not None and maker.homes is not None:
            maker.homes.pages.close()
        for param, home in homes.items():
            if param.device != home:
                param.data = param.data.to(home)
        raise


def _make_layout(survey: Survey, maker: _SlotMaker, changes: list[Swap | TappedEmbedding]) -> Layout:
    """Make a layout whose changes are noted in `changes`, those of it that were made before one failed too."""
    swaps = swap_linears(survey.places(), maker.layer)
    changes += swaps
    made = {swap.original: swap.layer for swap in swaps}
    # One in several places belongs to the first unit that has it.
    drawn = [_make_unit(plan, made) for plan in survey.drawn]
    always = _make_unit(survey.always, made)
    layout = Layout(drawn, always, changes, survey.drawable, below=survey.below)
    layout.resting = None if maker.kinds is None else maker.kinds.resting
    layout.streamed = None if maker.homes is None else maker.homes.pages
    layout.masters = maker.masters
    layout.on_masters, layout.copies = maker.on_masters, maker.copies
    if survey.with_first.full or survey.slot_with_first:
        layout.with_first = _make_unit(survey.with_first, made)
    outer, kind = survey.outer, None if maker.kinds is None else maker.kinds.of_head
    if outer is None and kind is not None and survey.method.embeddings_rest:
        outer = find_still_outer(survey.model)
    if outer is not None:
        layers, taps = add_outer_slots(outer, survey.method.get("rank", 0), maker.tracker, changes, kind)
        for path, layer in layers.items():
            maker.keep(layer, path)
        if survey.outer is not None:
            _share_out(layout, layers, taps)
    if maker.kinds is not None:
        still = swap_linears(maker.kinds.still, maker.still)
        changes += still
        owners = {param: unit for unit in drawn for param in unit.full}
        for layer in dict.fromkeys(swap.layer for swap in still):
            if isinstance(layer, WokenLinear):
                owners[layer.stored_weight].woken.append(layer)
    if maker.device is not None:
        survey.model.to(maker.device)
    return layout


def _share_out(layout: Layout, layers: Mapping[str, SlotModule], taps: list[TappedEmbedding]) -> None:
    """Give the slots of embedding and head to the units with which they train."""
    rests = layout.with_first
    for path, layer in layers.items():
        owner = rests if rests is not None and isinstance(layer, LowRankEmbedding) else layout.always
        owner.lowrank[path] = layer
    if rests is not None:
        rests.taps = taps
        rests.rest_lookups(True)


def _make_unit(plan: UnitPlan, made: dict[nn.Module, LowRankLinear]) -> Unit:
    layers = {place.path: made.pop(place.layer) for place in plan.places if place.layer in made}
    return Unit(plan.name, plan.full, {**layers}, woken=[x for x in layers.values() if isinstance(x, WokenLinear)])
