"""Weights of blocks that rest, in a store until their group runs; stand-ins are in their place meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.methods.shelf import Shelf
from lisa_kernels.methods.units import Unit
from lisa_kernels.paging import Store


class RestingWeights:
    """Keeps the weights of some units away: their parameters then hold NaN, and no bytes.

    `state_dict()` of the model has the true weights, and `load_state_dict()` writes them, a block at a time. A copy of
    the model is refused while weights are away.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], store: Callable[[], Store]) -> None:
        self._units = list(units)
        self._shelf = Shelf(store, "weights")
        self._away: set[int] = set()
        self._hooks: list[Any] = []
        # Of each unit its parameters by their names in the block.
        self._inside: list[dict[str, nn.Parameter]] = []
        for number, unit in enumerate(self._units):
            block = model.get_submodule(unit.name)
            names = {param: name for name, param in block.named_parameters()}
            self._inside.append({names[param]: param for param in unit.full})
            self._hooks += [
                block.register_state_dict_post_hook(partial(self._show, number)),
                block.register_load_state_dict_pre_hook(partial(self._come_to_load, number)),
                block.register_load_state_dict_post_hook(partial(self._leave_after, number)),
            ]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copies of the model, whose weights would be stand-ins."""
        raise InputError(
            "weights of resting groups are in the store, so that the model cannot be copied or pickled; copy it after "
            "detach(), or load its state_dict() into another."
        )

    @torch.no_grad()
    def keep_only(self, numbers: Collection[int]) -> None:
        """Have the weights of these units on the device, and of no others."""
        self._put_away([n for n in range(len(self._units)) if n not in numbers and n not in self._away])
        for number in sorted(self._away & set(numbers)):
            self._bring(number)

    def prefetch(self, unit: Unit) -> None:
        """Begin to bring a unit's weights."""
        self._shelf.prefetch(unit)

    @torch.no_grad()
    def end(self) -> None:
        """Bring all weights back for good."""
        for number in sorted(self._away):
            self._bring(number)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _put_away(self, numbers: list[int]) -> None:
        # All of them before any is given up: a page that cannot be written stops the run with nothing lost.
        for number in numbers:
            self._shelf.put(self._units[number], {"": {n: p.data for n, p in self._inside[number].items()}})
        for number in numbers:
            for param in self._inside[number].values():
                param.data = torch.full((), torch.nan, dtype=param.dtype, device=param.device).expand(param.shape)
            self._away.add(number)

    def _bring(self, number: int) -> None:
        taken = self._shelf.take(self._units[number])[""]
        for name, param in self._inside[number].items():
            # Each with a storage of its own, so that it can be saved, shared and let go as any weight.
            param.data = taken.pop(name).clone()
        self._away.discard(number)

    def _show(self, number: int, block: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Put the true weights into the state of a block that rests."""
        if number in self._away:
            home: dict[str, Tensor] = self._shelf.held_of(self._units[number].name)[""]
            state.update({prefix + name: home[name] for name in self._inside[number] if prefix + name in state})

    @torch.no_grad()
    def _come_to_load(self, number: int, *_: Any) -> None:
        if number in self._away:
            self._bring(number)
            self._away.add(number)

    @torch.no_grad()
    def _leave_after(self, number: int, *_: Any) -> None:
        if number in self._away:
            self._put_away([number])
