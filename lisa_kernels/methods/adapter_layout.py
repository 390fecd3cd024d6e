"""Which layers of a model carry an adapter, and which train in full beside it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.layers import check_untied, find_linears
from lisa_kernels.layers.linears import Place
from lisa_kernels.methods.definitions import AdapterMethod


def _output_layer(model: nn.Module) -> nn.Module | None:
    get_output = getattr(model, "get_output_embeddings", None)
    head = get_output() if callable(get_output) else None
    return head if isinstance(head, nn.Module) else None


def new_head(model: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of a classification head by name: layers on top that no pretraining has trained.

    They are the model's direct children that are not its backbone, when it has no language-model head.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix) or _output_layer(model) is not None:
        return {}
    return {name: child for name, child in model.named_children() if name != prefix}


def adapter_places(model: nn.Module, method: AdapterMethod) -> list[Place]:
    """Return the linears that the targets name, outside a new head, which trains in full.

    Refuses a target that names none, a rank that does not fit, and a weight that another module uses too.
    """
    head = {module for part in new_head(model).values() for module in part.modules()}
    if method.targets == "all-linear":
        output = _output_layer(model)
        places = find_linears({"": model}, method.rank, lambda path, layer: layer is not output and layer not in head)
        if not places:
            raise InputError(f"{type(model).__name__} has no linear layer that could carry an adapter.")
    else:
        places = _targeted(model, method, head)
    check_untied(
        model, places, "which an adapter would change when merged; leave it out of the targets, or untie the two"
    )
    return places


def _targeted(model: nn.Module, method: AdapterMethod, head: set[nn.Module]) -> list[Place]:
    def ends_with(*names: str) -> Callable[[str, nn.Module], bool]:
        return lambda path, layer: (
            layer not in head and any(path == name or path.endswith(f".{name}") for name in names)
        )

    for target in method.targets:
        if not find_linears({"": model}, 0, ends_with(target)):
            known = find_linears({"": model}, 0, lambda path, layer: layer not in head)
            raise unknown_name("target", target, {place.name for place in known})
    return find_linears({"": model}, method.rank, ends_with(*method.targets))
