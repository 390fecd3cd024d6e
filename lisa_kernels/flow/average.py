"""The average of a model's weights over its steps, of each group over that group's own steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lisa_kernels.flow.route import Route

Tensors = tuple[Tensor, ...] | list[Tensor]


class AveragedGroups:
    """Exponential averages by `torch.optim.swa_utils`: one of what is shared, one of each group of blocks.

    A group that rests is left alone, so that its weights may be elsewhere, and its average looks back over as many of
    its own steps as any other's. decay: the share of the old average that a step keeps; over the first n steps at most
    (1 + n) / (10 + n), so that the beginning is soon forgotten. paged: the weights of a group that rests are in a store
    and are read from there. Takes the bytes of the weights once more. Made before the model is attached.
    """

    def __init__(
        self, model: nn.Module, route: Route, decay: float, paged: bool = False, blocks: str = "blocks"
    ) -> None:
        self._route, self._paged, self._blocks = route, paged, blocks
        self._parts = [
            AveragedModel(part, multi_avg_fn=_towards(decay)) for part in _parts(model, route, blocks)
        ]  # fmt: skip

    @torch.no_grad()
    def update(self, model: nn.Module, group: int) -> None:
        """Take in the weights after a step of `group`, which may rest again by now."""
        shared, *groups = _parts(model, self._route, self._blocks)
        self._parts[0].update_parameters(shared)
        average, moved = self._parts[1 + group], groups[group]
        if self._paged:
            # The parameters of a group that rests are stand-ins; its state has the weights.
            state, moved = moved.state_dict(), copy.deepcopy(average.module)
            moved.load_state_dict(state)
        average.update_parameters(moved)

    @torch.no_grad()
    def copy_into(self, model: nn.Module) -> None:
        """Make the weights of `model` the averages."""
        for average, part in zip(self._parts, _parts(model, self._route, self._blocks)):
            part.load_state_dict(average.module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return averages and numbers of steps."""
        return {str(number): part.state_dict() for number, part in enumerate(self._parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for number, part in enumerate(self._parts):
            part.load_state_dict(state[str(number)])


def _parts(model: nn.Module, route: Route, blocks: str) -> list[nn.Module]:
    """Return what is shared by all groups, and then each group's blocks."""
    stack = model.get_submodule(blocks)
    shared = nn.ModuleDict({name: child for name, child in model.named_children() if child is not stack})
    groups = [nn.ModuleList(stack[number] for number in route.blocks_of(group)) for group in range(route.groups)]  # type: ignore[index]
    return [shared, *groups]


def _towards(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Return what moves averages towards weights, as `AveragedModel` calls it."""

    def move(averages: Tensors, weights: Tensors, steps: Tensor | int) -> None:
        count = torch.as_tensor(steps, dtype=torch.float32, device=averages[0].device)
        share = 1 - torch.clamp((1 + count) / (10 + count), max=decay)
        for average, weight in zip(averages, weights):
            average.lerp_(weight.to(average.dtype), share.to(average.dtype))

    return move
