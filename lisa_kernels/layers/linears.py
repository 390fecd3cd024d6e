"""Which modules of a model are linear layers that may be worked on, and where they sit."""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

from lisa_kernels.distributed import is_unit
from lisa_kernels.errors import InputError
from lisa_kernels.ops.lowrank_linear import linear

# Below this a matrix is a gate or a small classifier: it is trained in full, its gradient costs nothing.
MIN_SIDE = 8


# Functions of a module that are put on modules of a model as their methods.
_ours: set[Callable[..., Any]] = set()
_Function = TypeVar("_Function", bound=Callable[..., Any])


def plain_function(function: _Function) -> _Function:
    """Have a function of a module survive, as a method put on a layer, when the layer is saved or sent elsewhere."""
    _ours.add(function)
    return function


def plain_forward(layer: nn.Module) -> MethodType:
    """Return a forward for a linear layer, to be put on the layer itself, that is its own but for the products."""
    return MethodType(_forward_transposed if is_conv1d(layer) else _forward, layer)


@plain_function
def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    return linear(x, weight, bias)  # type: ignore[arg-type]


@plain_function
def _forward_transposed(layer: nn.Module, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    return linear(x, weight.t(), bias)  # type: ignore[arg-type]


def _is_plain(forward: object) -> bool:
    return isinstance(forward, MethodType) and forward.__func__ in (_forward, _forward_transposed)


def _reduced(method: MethodType) -> str | tuple[Any, ...]:
    """Return what a pickle holds of a method: of ours the function, for which no layer could be asked by name."""
    function = method.__func__
    return (_bound, (function, method.__self__)) if function in _ours else method.__reduce__()


def _bound(function: Callable[..., Any], layer: nn.Module) -> MethodType:
    return MethodType(function, layer)


# What a whole model is saved by, and sent to other processes.
copyreg.pickle(MethodType, _reduced)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether the module's forward is that of transformers' Conv1D: a linear layer with its weight [in, out]."""
    # Without the module there is none of its layers.
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and type(module).forward is home.Conv1D.forward


def is_linear(module: nn.Module) -> bool:
    """Return whether the module is a linear layer, and nothing else, that can carry a slot.

    Its forward is `nn.Linear`'s or Conv1D's own; subclasses with another (routers, quantised layers), a forward put on
    the module by someone else, and weights that are made anew by a hook or a parametrization are not understood.
    """
    forward = vars(module).get("forward")
    if forward is not None and not _is_plain(forward):
        return False
    if type(module).forward is not nn.Linear.forward and not is_conv1d(module):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and "bias" in module._parameters


def is_trainable(layer: nn.Module) -> bool:
    """Return whether a linear layer's weight may train: its user did not freeze it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.requires_grad


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (m, n) = (outputs, inputs) of a linear layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    first, second = weight.shape
    stored_transposed = getattr(module, "transposed", False) or is_conv1d(module)
    return (int(second), int(first)) if stored_transposed else (int(first), int(second))


@dataclass(frozen=True)
class Place:
    """Where a linear layer sits: `parent.name`, known from the model as `path`, under one of the roots searched."""

    path: str
    root: str
    parent: nn.Module
    name: str
    layer: nn.Module


def find_linears(
    roots: Mapping[str, nn.Module], rank: int, wanted: Callable[[str, nn.Module], bool] = lambda path, layer: True
) -> list[Place]:
    """Return the wanted linear layers under `roots` (by their paths) that can carry a slot of `rank`.

    Layers with a side below 8 are left out (they are trained in full). Raises InputError when `rank` is more than one
    of the matrices allows.
    """
    found = []
    for root, module in roots.items():
        for prefix, parent in module.named_modules():
            # It multiplies by its projection's weight and never calls it.
            if isinstance(parent, nn.MultiheadAttention):
                continue
            for name, child in parent.named_children():
                path = ".".join(part for part in (root, prefix, name) if part)
                if is_linear(child) and min(linear_shape(child)) >= MIN_SIDE and wanted(path, child):
                    found.append(Place(path, root, parent, name, child))
    for place in found:
        if is_unit(place.layer):
            raise InputError(
                f"{place.path} is under fully_shard by itself, where it can carry no slot; call fully_shard on blocks "
                "and on the model, not on single layers."
            )
        m, n = linear_shape(place.layer)
        if rank > min(m, n):
            raise InputError(
                f"rank {rank} is more than {place.path} [{m}, {n}] allows; use a rank of at most {min(m, n)}."
            )
    return found


def check_untied(model: nn.Module, places: Iterable[Place], consequence: str) -> None:
    """Raise InputError, with the `consequence` and what to do, for a weight at `places` that another module reads."""
    readers = _readers(model)
    for place in places:
        if tied := _others(readers, place):
            raise InputError(f"the weight of {place.path} is tied to that of {tied[0]}, {consequence}.")


def untied(model: nn.Module, places: Iterable[Place]) -> list[Place]:
    """Return those of the places whose weight no other module reads."""
    readers = _readers(model)
    return [place for place in places if not _others(readers, place)]


def _readers(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    readers: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for param in module.parameters(recurse=False):
            readers.setdefault(id(param), []).append((path, module))
    return readers


def _others(readers: Mapping[int, list[tuple[str, nn.Module]]], place: Place) -> list[str]:
    return [path for path, module in readers[id(place.layer.weight)] if module is not place.layer]
