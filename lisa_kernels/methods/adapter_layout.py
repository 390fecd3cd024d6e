"""Which layers of a model carry an adapter, and which train in full beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.layers import check_untied, find_blocks, find_linears, output_layer
from lisa_kernels.layers.linears import Place
from lisa_kernels.methods.definitions import AdapterMethod

# Of the weights of a decoder's blocks, what may be beyond adapters and is not spoken of.
SMALL_SHARE = 0.05


def new_head(model: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of a classification head by name: layers on top that no pretraining has trained.

    They are the model's direct children that are not its backbone, when it has no language-model head.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix) or output_layer(model) is not None:
        return {}
    return {name: child for name, child in model.named_children() if name != prefix}


def adapter_places(model: nn.Module, method: AdapterMethod) -> list[Place]:
    """Return the linears that the targets name, outside a new head, which trains in full.

    Refuses a target that names none, a rank that does not fit, and a weight that another module uses too.
    """
    head = {module for part in new_head(model).values() for module in part.modules()}
    if method.targets == "all-linear":
        output = output_layer(model)
        places = find_linears({"": model}, method.rank, lambda path, layer: layer is not output and layer not in head)
        if not places:
            raise InputError(f"{type(model).__name__} has no linear layer that could carry an adapter.")
    else:
        places = _targeted(model, method, head)
    check_untied(
        model, places, "which an adapter would change when merged; leave it out of the targets, or untie the two"
    )
    return places


def beyond_adapters(model: nn.Module, places: Iterable[Place]) -> list[str]:
    """Return the paths of a decoder's matrices that no adapter at `places` reaches: experts, layers of a class's own.

    None where they are less than `SMALL_SHARE` of the blocks' weights, as routers are, and where there are no blocks.
    """
    try:
        path, blocks = find_blocks(model)
    except InputError:
        return []
    reached = {place.layer.weight for place in places}
    matrices = {
        f"{path}.{number}.{name}": param
        for number, block in enumerate(blocks)
        for name, param in block.named_parameters()
        if param.dim() >= 2
    }
    left = [name for name, param in matrices.items() if param not in reached]
    weights = sum(param.numel() for param in matrices.values())
    return left if sum(matrices[name].numel() for name in left) > SMALL_SHARE * weights else []


def is_all_adaptable(model: nn.Module) -> bool:
    """Tell whether adapters on all linears reach a decoder's blocks, whole, and nothing beside them but the head."""
    output = output_layer(model)
    places = find_linears({"": model}, 1, lambda path, layer: layer is not output)
    path, _ = find_blocks(model)
    return all(place.path.startswith(f"{path}.") for place in places) and not beyond_adapters(model, places)


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
