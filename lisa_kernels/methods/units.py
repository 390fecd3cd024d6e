"""The units that a method switches on and off: each block, and what stands around the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

from lisa_kernels.basis import BasisTracker, random_basis, stream_generator
from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.layers import LowRankLinear, ModelParts, find_linears, split_model, swap_linears
from lisa_kernels.layers.lowrank import Place, Swap
from lisa_kernels.methods.definitions import LoRAFA, Method


@dataclass
class Unit:
    """Something that is active as a whole: parameters trained at full rank, and layers trained through their slots."""

    name: str
    full: list[nn.Parameter] = field(default_factory=list)
    lowrank: dict[str, LowRankLinear] = field(default_factory=dict)

    def params(self) -> list[nn.Parameter]:
        """Return all parameters that train while the unit is active."""
        return self.full + [layer.slot for layer in self.lowrank.values()]


@dataclass
class Plan:
    """A model prepared for a method: the units in the draw, the one that always trains, and what was swapped."""

    drawn: list[Unit]
    always: Unit
    swaps: list[Swap]
    path: str

    def units(self) -> list[Unit]:
        """Return every unit, the drawn ones first."""
        return [*self.drawn, self.always]


def _distinct(params: Iterable[nn.Parameter], taken: set[int]) -> list[nn.Parameter]:
    """Return the parameters not yet in `taken`, and take them: a tied tensor belongs to one unit only."""
    fresh = []
    for param in params:
        if id(param) not in taken:
            taken.add(id(param))
            fresh.append(param)
    return fresh


def _swapped(swaps: list[Swap], root: str, taken: set[int]) -> dict[str, LowRankLinear]:
    """Return the new layers under one root by path, and take slots and weights; one in several places comes once."""
    layers = {}
    for swap in swaps:
        if swap.root == root and _distinct([swap.layer.slot], taken):
            layers[swap.path] = swap.layer
            taken.add(id(swap.layer.weight))
    return layers


def _block_unit(name: str, block: nn.Module, swaps: list[Swap], taken: set[int]) -> Unit:
    lowrank = _swapped(swaps, name, taken)
    return Unit(name, _distinct(block.parameters(), taken), lowrank)


def _layered_places(method: Method, parts: ModelParts) -> list[Place]:
    """Return the linears that get a slot; refuses more active layers than there are, and a rank that does not fit."""
    wanted, layers = method.get("active_layers", 1), len(parts.blocks)
    if wanted > layers:
        raise InputError(f"active_layers is {wanted}, but the model has {layers} layers; use at most {layers}.")
    if method.form != "low-rank":
        return []
    roots = {f"{parts.path}.{index}": block for index, block in enumerate(parts.blocks)}
    return find_linears(roots, method.get("rank", 0))


def layered_plan(model: nn.Module, method: Method, seed: int, blocks: str | None) -> Plan:
    """Prepare a model whose decoder blocks are switched (or, without a sampler, all active)."""
    parts = split_model(model, blocks)
    rank, gap, made = method.get("rank", 0), method.get("gap", 0), 0

    def make(layer: nn.Module, path: str) -> LowRankLinear:
        nonlocal made
        made += 1
        return LowRankLinear(layer, rank, tracker=BasisTracker(rank=rank, gap=gap, offset=0, seed=seed, stream=made))

    swaps = swap_linears(_layered_places(method, parts), make)
    taken: set[int] = set()
    drawn = [_block_unit(f"{parts.path}.{i}", block, swaps, taken) for i, block in enumerate(parts.blocks)]
    always = Unit("always")
    embeddings = method.get("embeddings", "always")
    if embeddings == "sampled":
        drawn += _outer_units(parts, taken)
    elif embeddings == "always":
        always.full = _distinct(parts.outer, taken)
    return Plan(drawn, always, swaps, parts.path)


def _outer_units(parts: ModelParts, taken: set[int]) -> list[Unit]:
    """Return embedding and head as units of their own; one where the head is tied and only a norm is left of it."""
    if not any(param.dim() >= 2 for param in parts.head):
        return [Unit("embeddings", _distinct(parts.outer, taken))]
    return [
        Unit(name, _distinct(getattr(parts, name), taken)) for name in ("embeddings", "head") if getattr(parts, name)
    ]


def _output_layer(model: nn.Module) -> nn.Module | None:
    get_output = getattr(model, "get_output_embeddings", None)
    head = get_output() if callable(get_output) else None
    return head if isinstance(head, nn.Module) else None


def _new_head(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a classification head: layers on top that no pretraining has trained.

    They are the model's direct children that are not its backbone, when it has no language-model head.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix) or _output_layer(model) is not None:
        return []
    return [part for name, child in model.named_children() if name != prefix for part in child.modules()]


def _adapter_places(model: nn.Module, method: LoRAFA) -> list[Place]:
    """Return the linears that the targets name; refuses a target that names none, and a rank that does not fit."""
    if method.targets == "all-linear":
        head = {_output_layer(model), *_new_head(model)}
        places = find_linears({"": model}, method.rank, lambda path, layer: layer not in head)
        if not places:
            raise InputError(f"{type(model).__name__} has no linear layer that could carry an adapter.")
        return places

    def ends_with(*names: str) -> Callable[[str, nn.Module], bool]:
        return lambda path, layer: any(path == name or path.endswith(f".{name}") for name in names)

    for target in method.targets:
        if not find_linears({"": model}, 0, ends_with(target)):
            raise unknown_name("target", target, {place.name for place in find_linears({"": model}, 0)})
    return find_linears({"": model}, method.rank, ends_with(*method.targets))


def adapter_plan(model: nn.Module, method: LoRAFA, seed: int) -> Plan:
    """Prepare a model whose targeted linears carry a slot that stays; needs no decoder blocks."""
    made = 0

    def make(layer: nn.Module, path: str) -> LowRankLinear:
        nonlocal made
        made += 1
        lowrank = LowRankLinear(layer, method.rank, scale=method.alpha / method.rank)
        generator = stream_generator(seed, made, 0)
        lowrank.activate(random_basis(method.rank, lowrank.in_features, generator, lowrank.slot.device))
        return lowrank

    new = [param for module in _new_head(model) for param in module.parameters(recurse=False)]
    swaps = swap_linears(_adapter_places(model, method), make)
    taken: set[int] = set()
    layers = _swapped(swaps, "", taken)
    return Plan([], Unit("adapters", _distinct(new, taken), layers), swaps, "")


def check_plan(model: nn.Module, method: Method, blocks: str | None) -> None:
    """Raise what `make_plan` would raise, and change nothing."""
    if isinstance(method, LoRAFA):
        _adapter_places(model, method)
    else:
        _layered_places(method, split_model(model, blocks))


def make_plan(model: nn.Module, method: Method, seed: int, blocks: str | None) -> Plan:
    """Prepare the model: swap the layers that get a slot and sort parameters into units."""
    if isinstance(method, LoRAFA):
        return adapter_plan(model, method, seed)
    return layered_plan(model, method, seed, blocks)
