"""Find a model's decoder blocks and what stands around them, by structure and never by class names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lisa_kernels.errors import InputError


@dataclass(frozen=True)
class ModelParts:
    """A language model cut at its decoder blocks; parameters not listed here are never trained by layer sampling.

    path: where the blocks are, e.g. "model.layers". embeddings: parameters before the blocks (token and position
    tables); head: those after them (final norm, output layer), without the ones tied to `embeddings`.
    """

    path: str
    blocks: tuple[nn.Module, ...]
    embeddings: tuple[nn.Parameter, ...]
    head: tuple[nn.Parameter, ...]

    @property
    def outer(self) -> tuple[nn.Parameter, ...]:
        """All parameters around the blocks."""
        return self.embeddings + self.head


def _config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return None if isinstance(config, nn.Module) else config


def _text_config(model: nn.Module) -> Any:
    get_text = getattr(_config(model), "get_text_config", None)
    return get_text() if callable(get_text) else None


def _nearest_config(model: nn.Module, path: str) -> Any:
    """Return the configuration of the innermost module on the way to `path` that has one."""
    names = path.split(".")
    for depth in range(len(names), -1, -1):
        config = _config(model.get_submodule(".".join(names[:depth])))
        if config is not None:
            return config
    return None


def _is_stack(module: nn.Module) -> bool:
    """Return whether the module is a list of two or more modules that have parts of their own."""
    return isinstance(module, nn.ModuleList) and len(module) > 1 and any(True for _ in module[0].children())


def _candidates(model: nn.Module) -> list[str]:
    """Return the paths of the lists of blocks that the model may mean, outermost ones only."""
    text = _text_config(model)
    count = getattr(text, "num_hidden_layers", None)
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and path}
    if count is None:
        lists = {path: module for path, module in lists.items() if len(module) > 1}
    else:
        # A vision tower may have as many layers: its own configuration tells it apart.
        configs = {path: _nearest_config(model, path) for path, module in lists.items() if len(module) == count}
        ours = [path for path, config in configs.items() if config is text or config == text]
        lists = {path: lists[path] for path in ours or [p for p, config in configs.items() if config is model.config]}
    # Hybrids have several types of blocks in one list; elsewhere such a list is something else.
    alike = {path: module for path, module in lists.items() if len({type(block) for block in module}) == 1}
    found = alike or {path: module for path, module in lists.items() if _is_stack(module)}
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


def find_blocks(model: nn.Module, path: str | None = None) -> tuple[str, tuple[nn.Module, ...]]:
    """Return (path, blocks) of the model's decoder blocks.

    They are the one `ModuleList` of `config.num_hidden_layers` modules of one type, outside vision towers; models
    without a configuration must have one such list. `path` names the list where that is not unique. Raises InputError.
    """
    if path is not None:
        try:
            blocks = model.get_submodule(path)
        except AttributeError:
            blocks = None
        if not isinstance(blocks, nn.ModuleList) or not len(blocks):
            near = ", ".join(_candidates(model)) or "none found"
            raise InputError(
                f"blocks={path!r} is not a list of blocks in this model; lists that could be meant: {near}."
            )
        return path, tuple(blocks)
    found = _candidates(model)
    if len(found) == 1:
        return found[0], tuple(model.get_submodule(found[0]))  # type: ignore[arg-type]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no list of decoder blocks (a ModuleList of config.num_hidden_layers modules); "
            'name it with blocks="path.to.list", or use LoRAFA, which needs no blocks.'
        )
    raise InputError(f"{type(model).__name__} has several lists of blocks: {', '.join(found)}; name one with blocks=….")


def split_model(model: nn.Module, path: str | None = None) -> ModelParts:
    """Return the model's decoder blocks and the parameters of its language part around them.

    The language part is every module around the blocks that has the blocks' own configuration, or none, down to the
    whole model; other towers in it (a list of blocks of their own, another configuration) are left out. In a larger
    model, such as a vision-language one, what follows the tower that holds the blocks is the head.
    """
    path, blocks = find_blocks(model, path)
    before: dict[int, nn.Parameter] = {}
    after: dict[int, nn.Parameter] = {}
    for module in _beside(model, path):
        table = any(isinstance(part, nn.Embedding) for part in module.modules())
        (before if table else after).update({id(param): param for param in module.parameters()})
    for level in _language_levels(model, path):
        after.update({id(param): param for param in level.parameters(recurse=False)})
    for found, group in ((token_embedding(model), before), (output_layer(model), after)):
        if found is not None:
            group.update({id(param): param for param in found.parameters()})
    in_blocks = {id(param) for block in blocks for param in block.parameters()}
    return ModelParts(
        path,
        blocks,
        tuple(param for key, param in before.items() if key not in in_blocks),
        tuple(param for key, param in after.items() if key not in in_blocks and key not in before),
    )


def token_embedding(model: nn.Module) -> nn.Module | None:
    """Return what a model of transformers says looks its tokens up; None of a model that says nothing."""
    return _said(model, "get_input_embeddings")


def output_layer(model: nn.Module) -> nn.Module | None:
    """Return what a model of transformers says its logits come from; None of a model that has, or says, nothing."""
    return _said(model, "get_output_embeddings")


def _said(model: nn.Module, name: str) -> nn.Module | None:
    get = getattr(model, name, None)
    found = get() if callable(get) else None
    return found if isinstance(found, nn.Module) else None


def no_ones(model: nn.Module, path: str) -> list[nn.Parameter]:
    """Return the parameters that are not in one block of the list at `path` alone: outside, or in several."""
    owners: dict[nn.Parameter, set[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        inside = name.startswith(f"{path}.")
        owners.setdefault(param, set()).add(name[len(path) + 1 :].partition(".")[0] if inside else "")
    return [param for param, blocks in owners.items() if len(blocks) > 1 or "" in blocks]


def _language_levels(model: nn.Module, path: str) -> list[nn.Module]:
    """Return the modules around the list of blocks that belong to its language model, innermost first."""
    config = _nearest_config(model, path)
    names = path.split(".")
    levels: list[nn.Module] = []
    for depth in range(len(names) - 1, -1, -1):
        level = model.get_submodule(".".join(names[:depth]))
        own = _config(level)
        if levels and own is not None and own is not config and own != config:
            break
        levels.append(level)
    return levels


def _beside(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """Yield the modules of the language part that stand beside the blocks, innermost first."""
    config = _nearest_config(model, path)
    inside = model.get_submodule(path)
    for level in _language_levels(model, path):
        yield from (child for child in level.children() if not _holds(child, inside) and not _is_tower(child, config))
        inside = level
    if inside is not model:
        # What comes before the language tower prepares other inputs (vision, projector); what follows it is the head.
        children = list(model.children())
        place = next(index for index, child in enumerate(children) if _holds(child, inside))
        yield from (child for child in children[place + 1 :] if not _is_tower(child, config))


def _holds(module: nn.Module, wanted: nn.Module) -> bool:
    return any(part is wanted for part in module.modules())


def _is_tower(module: nn.Module, config: Any) -> bool:
    own = _config(module)
    return (own is not None and own is not config and own != config) or any(map(_is_stack, module.modules()))
