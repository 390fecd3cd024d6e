"""What a method would do to a model, found out before anything is changed: which parameters train, and how."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.layers import (
    ModelParts,
    check_untied,
    find_blocks,
    find_linears,
    is_trainable,
    no_ones,
    split_model,
)
from lisa_kernels.layers.linears import Place
from lisa_kernels.methods.adapter_layout import adapter_places, beyond_adapters, new_head
from lisa_kernels.methods.definitions import AdapterMethod, Method
from lisa_kernels.methods.outer_slots import OuterPlaces, find_outer


@dataclass
class UnitPlan:
    """What will train as a whole: parameters at full rank, and the places of linears that get a slot."""

    name: str
    full: list[nn.Parameter] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return bool(self.full or self.places)


@dataclass
class Survey:
    """What is in a model and what a method would do to it.

    blocks: the decoder blocks, none for adapters; path: where their list is, "" where adapters find none. drawn: one
    plan for each block and, where they are sampled, for embedding and head; always: what trains beside the draw; outer:
    embedding and head, where they get slots.
    with_first: what trains at full rank while the first block does; slot_with_first: whether the token embedding's does
    so too. below: whether something before the blocks trains always, down to which every backward reaches.
    frozen: what the method would train, had the user not frozen it. beyond: the paths of matrices that adapters on all
    linear layers do not reach.
    """

    model: nn.Module
    method: Method
    blocks: tuple[nn.Module, ...] = ()
    drawn: list[UnitPlan] = field(default_factory=list)
    always: UnitPlan = field(default_factory=lambda: UnitPlan("always"))
    outer: OuterPlaces | None = None
    with_first: UnitPlan = field(default_factory=lambda: UnitPlan("with-first-block"))
    slot_with_first: bool = False
    below: bool = False
    frozen: list[nn.Parameter] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)
    path: str = ""

    @property
    def drawable(self) -> list[int]:
        """The numbers of the units that can be drawn: a layer that is frozen whole keeps its number and never is."""
        return [number for number, plan in enumerate(self.drawn) if plan.trains]

    def places(self) -> list[Place]:
        """Return the place of every linear that gets a slot, in the order in which they are made."""
        return [place for plan in (*self.drawn, self.always) for place in plan.places]

    def frozen_names(self) -> list[str]:
        """Return the paths of the parameters that the method leaves out because they were frozen."""
        frozen = set(self.frozen)
        return [name for name, param in self.model.named_parameters() if param in frozen]

    def resting_head(self) -> list[str]:
        """Return the paths of a task's own head, such as a classifier's, that this method never trains."""
        trained = {param for plan in (*self.drawn, self.with_first, self.always) for param in plan.full}
        trained.update(self.outer.weights() if self.outer else ())
        trained.update(place.layer.weight for place in self.places())  # type: ignore[misc]
        left = {
            path: set(part.parameters()) - trained - set(self.frozen) for path, part in new_head(self.model).items()
        }
        return [path for path, params in left.items() if params]


class _Shares:
    """Gives each parameter to one plan only, a tied one to the first that asks; the frozen ones to none."""

    def __init__(self) -> None:
        self._taken: set[nn.Parameter] = set()
        self.frozen: list[nn.Parameter] = []

    def take(self, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        fresh = [param for param in dict.fromkeys(params) if param not in self._taken]
        self._taken.update(fresh)
        self.frozen += [param for param in fresh if not param.requires_grad]
        return [param for param in fresh if param.requires_grad]


def survey_model(model: nn.Module, method: Method, blocks: str | None = None) -> Survey:
    """Return what `method` would do to the model; nothing is changed. Raises InputError for what cannot work."""
    survey = (
        _adapter_survey(model, method, blocks)
        if isinstance(method, AdapterMethod)
        else _layered_survey(model, method, blocks)
    )
    _check_trainable(survey)
    return survey


def _adapter_survey(model: nn.Module, method: AdapterMethod, blocks: str | None) -> Survey:
    """Survey a model whose targeted linears carry a slot that stays, beside weights that never train."""
    shares = _Shares()
    head = shares.take(param for part in new_head(model).values() for param in part.parameters())
    always = UnitPlan("adapters", head, adapter_places(model, method))
    beyond = beyond_adapters(model, always.places) if method.targets == "all-linear" else []
    path = _path_if_any(model, blocks)
    survey = Survey(model, method, always=always, frozen=shares.frozen, beyond=beyond, path=path)
    if method.get("embeddings", "frozen") == "low-rank":
        survey.outer = find_outer(model, split_model(model, blocks))
        twice = {place.layer for place in always.places} & {place.layer for place in _heads(survey.outer)}
        if twice:
            raise InputError(
                f'targets {method.targets!r} name the output layer, which embeddings="low-rank" trains already; leave '
                "it out of one of them."
            )
    return survey


def _path_if_any(model: nn.Module, blocks: str | None) -> str:
    try:
        return find_blocks(model, blocks)[0]
    except InputError:
        return ""


def _heads(outer: OuterPlaces | None) -> list[Place]:
    return [] if outer is None else outer.head


def _layered_survey(model: nn.Module, method: Method, blocks: str | None) -> Survey:
    """Survey a model whose decoder blocks are switched (or, without a sampler, all active)."""
    parts = split_model(model, blocks)
    wanted, layers = method.get("active_layers", 1), len(parts.blocks)
    if wanted > layers:
        raise InputError(f"active_layers is {wanted}, but the model has {layers} layers; use at most {layers}.")
    shares = _Shares()
    survey = Survey(model, method, parts.blocks, frozen=shares.frozen, path=parts.path)
    if method.around == "all":
        # What is frozen there is a model of its own, such as an encoder, and no oversight.
        survey.always.full = shares.take(param for param in no_ones(model, parts.path) if param.requires_grad)
    places = _block_places(model, method, parts)
    for index, block in enumerate(parts.blocks):
        name = f"{parts.path}.{index}"
        inside = [place for place in places if place.root == name]
        shares.take(place.layer.weight for place in inside)  # type: ignore[misc]
        survey.drawn.append(UnitPlan(name, shares.take(block.parameters()), inside))
    embeddings = method.get("embeddings", "always")
    if embeddings in ("low-rank", "with-first-block"):
        survey.outer = find_outer(model, parts)
        shares.take(survey.outer.weights() if survey.outer else ())
    if embeddings == "sampled":
        survey.drawn += [UnitPlan(name, shares.take(params)) for name, params in _outer_units(parts)]
    elif embeddings == "with-first-block":
        _rest_with_first_block(survey, shares, parts)
    elif embeddings != "frozen" and method.around == "language":
        survey.below = any(param.requires_grad for param in parts.embeddings)
        survey.always.full = shares.take(parts.outer)
    return survey


def _rest_with_first_block(survey: Survey, shares: _Shares, parts: ModelParts) -> None:
    """Have what lies before the blocks train while the first of them does; refuses a first block that never does."""
    survey.with_first.full = shares.take(parts.embeddings)
    survey.slot_with_first = survey.outer is not None and survey.outer.embedding is not None
    survey.always.full = shares.take(parts.head)
    if not survey.drawn[0].trains and (survey.with_first.full or survey.slot_with_first):
        raise InputError(
            f"{survey.drawn[0].name} is frozen whole (requires_grad=False), and the token embedding would train with "
            'it, which is never; unfreeze one of its parameters, or use embeddings="low-rank" or "frozen".'
        )


def _block_places(model: nn.Module, method: Method, parts: ModelParts) -> list[Place]:
    """Return the linears that get a slot; refuses a rank that does not fit, and a weight that another module uses."""
    if method.form != "low-rank":
        return []
    roots = {f"{parts.path}.{index}": block for index, block in enumerate(parts.blocks)}
    places = find_linears(roots, method.get("rank", 0), lambda path, layer: is_trainable(layer))
    check_untied(model, places, "whose gradient a low-rank slot would not see; untie the two, or use LISA or OWS")
    return places


def _outer_units(parts: ModelParts) -> list[tuple[str, tuple[nn.Parameter, ...]]]:
    """Return embedding and head as units of their own; one where the head is tied and only a norm is left of it."""
    if not any(param.dim() >= 2 for param in parts.head):
        return [("embeddings", parts.outer)]
    return [(name, getattr(parts, name)) for name in ("embeddings", "head") if getattr(parts, name)]


def _check_trainable(survey: Survey) -> None:
    """Refuse a model with less to train than the method draws."""
    method, drawable = survey.method, len(survey.drawable)
    if not (survey.drawable or survey.always.trains or survey.outer):
        raise InputError(
            f"all {len(survey.frozen)} parameters that method {method.name!r} would train are frozen "
            "(requires_grad=False); call requires_grad_(True) on those that are to train."
        )
    wanted = method.get("active_layers", 0)
    if wanted > drawable:
        raise InputError(
            f"active_layers is {wanted}, but {len(survey.drawn) - drawable} of the model's {len(survey.drawn)} layers "
            f"are frozen whole (requires_grad=False); use at most {drawable}, or unfreeze some."
        )
