"""Embedding and output layer in low rank: which modules these are, and the slots they get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lisa_kernels.basis import BasisTracker
from lisa_kernels.errors import InputError
from lisa_kernels.layers import (
    AccumulatingEmbedding,
    LowRankEmbedding,
    LowRankLinear,
    ModelParts,
    RestingLinear,
    SlotModule,
    TappedEmbedding,
    find_linears,
    is_trainable,
    linear_shape,
    lookup_factor,
    output_layer,
    swap_linears,
    tap_embedding,
    token_embedding,
)
from lisa_kernels.layers.linears import Place
from lisa_kernels.layers.lowrank import Swap

ADVICE = 'use embeddings="always", "frozen" or "sampled".'


@dataclass(frozen=True)
class OuterPlaces:
    """Where a model's token embedding and its output layer are; `tied` if they read one weight.

    Without the embedding where that is frozen, without a head where that is or can carry no slot. around: the modules
    that the embedding is in.
    """

    path: str
    embedding: nn.Embedding | None
    head: list[Place]
    tied: bool
    around: tuple[nn.Module, ...] = ()

    def weights(self) -> list[nn.Parameter]:
        """Return the weights that train through slots."""
        layers = [place.layer for place in self.head] + ([] if self.embedding is None else [self.embedding])
        return [layer.weight for layer in layers]  # type: ignore[misc]


def find_outer(model: nn.Module, parts: ModelParts) -> OuterPlaces | None:
    """Return the places of embedding and head that get a slot, None where both are frozen.

    Raises InputError where they cannot carry one.
    """
    embedding, output = token_embedding(model), output_layer(model)
    weight = getattr(embedding, "weight", None)
    tied = weight is not None and getattr(output, "weight", None) is weight
    head = find_linears({"": model}, 0, lambda path, layer: layer is output and is_trainable(layer))
    if isinstance(weight, nn.Parameter) and not weight.requires_grad:
        return OuterPlaces("", None, head, tied) if head else None
    if not isinstance(embedding, nn.Embedding) or not any(weight is param for param in parts.embeddings):
        raise InputError(
            f"{type(model).__name__} names no token embedding (get_input_embeddings) that could train in low rank; "
            f"{ADVICE}"
        )
    path, around = _way_to(embedding, model)
    lookup_factor(embedding)
    if tied and not head:
        raise InputError(f"{path} is tied to an output layer that cannot carry a low-rank slot; {ADVICE}")
    return OuterPlaces(path, embedding, head, tied, around)


def find_still_outer(model: nn.Module) -> OuterPlaces | None:
    """Return the places of embedding and head that never train, so that they can rest; None where neither can."""
    embedding, output = token_embedding(model), output_layer(model)
    head = find_linears({"": model}, 0, lambda path, layer: layer is output)
    tied = embedding is not None and getattr(output, "weight", None) is _weight(embedding)
    read = {id(module) for module in model.modules() if _weight(module) is _weight(embedding)}
    alone = read <= {id(embedding), id(output)}
    if not isinstance(embedding, nn.Embedding) or (tied and not head) or not alone:
        return OuterPlaces("", None, head, False) if head and not tied else None
    path, around = _way_to(embedding, model)
    try:
        lookup_factor(embedding)
    except InputError:
        # It changes its table, or returns more than its rows: it stays as it is, and what is tied to it.
        return OuterPlaces("", None, head, False) if head and not tied else None
    return OuterPlaces(path, embedding, head, tied, around)


def _weight(module: Any) -> Any:
    return getattr(module, "_parameters", {}).get("weight")


def _way_to(module: nn.Module, model: nn.Module) -> tuple[str, tuple[nn.Module, ...]]:
    """Return a module's path, and the modules that it is in, the model first."""
    path = next(path for path, found in model.named_modules() if found is module)
    names = path.split(".")
    return path, tuple(model.get_submodule(".".join(names[:depth])) for depth in range(len(names)))


def add_outer_slots(
    places: OuterPlaces, rank: int, make_tracker: Callable[[int], BasisTracker],
    changes: list[Swap | TappedEmbedding], resting: str | None = None,
) -> tuple[dict[str, SlotModule], list[TappedEmbedding]]:  # fmt: skip
    """Give embedding and head a slot of at most `rank`, one between them where they are tied.

    Returns the layers by path and the embedding that was tapped; what is changed is added to `changes`. make_tracker:
    from the rank that fits to a tracker. resting: how the head rests, None: as it is; the embedding's table is then in
    host memory.
    """

    def make(layer: nn.Module, path: str) -> LowRankLinear:
        fits = min(rank, *linear_shape(layer))
        if resting is not None:
            return RestingLinear(layer, fits, resting, make_tracker(fits), path)
        return LowRankLinear(layer, fits, tracker=make_tracker(fits))

    layers: dict[str, SlotModule] = {}
    swaps = swap_linears(places.head, make)
    changes += swaps
    table = places.embedding
    if table is not None and not places.tied:
        fits = min(rank, table.num_embeddings, table.embedding_dim)
        kind = LowRankEmbedding if resting is None else AccumulatingEmbedding
        layers[places.path] = kind(table, fits, make_tracker(fits))
    if swaps:
        layers[swaps[0].path] = swaps[0].layer
    if table is None:
        return layers, []
    holder = swaps[0].layer if places.tied else layers[places.path]
    tap = tap_embedding(places.path, table, holder, places.around)
    changes.append(tap)
    return layers, [tap]
