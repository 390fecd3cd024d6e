"""A forward and backward of a model that is too large to be held with its activations, or on the device at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from lisa_kernels.layers.plain_linears import PlainLinears

# Of an output layer's weight on the device at a time.
TILE_BYTES = 64 << 20
RECOMPUTED: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


class Visits:
    """Has a model's blocks keep their inputs alone, and compute on another device one by one, while it is entered.

    recomputed: whether blocks are computed again in the backward, whatever the model's own checkpointing is. head: the
    output layer, if it is to compute there too, an nn.Linear in tiles. device: where weights come to for each forward
    of theirs, with what they are given; what they return goes back to where they are. None, or where the model is: they
    compute there, with products that a CPU can bear. The parameters stay the tensors that they are. For weights without
    gradients, where they go anywhere.
    """

    def __init__(
        self, model: nn.Module, blocks: Iterable[nn.Module], device: torch.device | None, *,
        head: nn.Module | None = None, recomputed: bool = True,
    ) -> None:  # fmt: skip
        here = next((param.device for param in model.parameters()), None)
        self._model = model
        self._products: PlainLinears | None = None
        self.device = None if device == here else device
        self._modules = dict.fromkeys(blocks if recomputed or self.device is not None else (), recomputed)
        if head is not None and self.device is not None:
            self._modules[head] = False
        self._before: dict[nn.Module, Any] = {}
        # Whether what runs has run before: in a backward.
        self.again = False

    def __enter__(self) -> None:
        if self.device is None:
            self._products = PlainLinears(self._model)
        for module, recomputed in self._modules.items():
            self._before[module] = vars(module).get("forward")
            module.forward = self._visiting(module, module.forward, recomputed)

    def __exit__(self, *_: object) -> None:
        if self._products is not None:
            self._products.remove()
        for module, forward in self._before.items():
            del module.forward
            if forward is not None:
                module.forward = forward
        self._before = {}

    def _visiting(self, module: nn.Module, forward: Callable[..., Any], recomputed: bool) -> Callable[..., Any]:
        if self.device is None:
            run = forward
        elif type(module) is nn.Linear and "forward" not in vars(module):
            return partial(_product_in_tiles, module, self.device)
        else:
            run = _Visitor(module, forward, self.device).visit
        if not recomputed:
            return run

        def recomputing(*args: Any, **named: Any) -> Any:
            return checkpoint(run, *args, context_fn=self._contexts, **RECOMPUTED, **named)

        return recomputing

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._once_more()

    @contextmanager
    def _once_more(self) -> Iterator[None]:
        self.again = True
        try:
            yield
        finally:
            self.again = False


class _Visitor(nn.Module):
    """Runs a module's forward on a device, with copies of its weights that go with the graph."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], device: torch.device) -> None:
        super().__init__()
        self.visitor, self._run, self._device = module, forward, device

    def forward(self, *args: Any, **named: Any) -> Any:
        """Do what the module's forward does, with what is in the place of its weights."""
        return self._run(*args, **named)

    def visit(self, *args: Any, **named: Any) -> Any:
        """Do it on the device; what it returns is where the module is."""
        held = dict(chain(self.named_parameters(), self.named_buffers()))
        home = next((tensor.device for tensor in held.values()), torch.device("cpu"))
        there = {name: tensor.to(self._device) for name, tensor in held.items()}
        args, named = tree_map_only(Tensor, lambda tensor: tensor.to(self._device), (args, named))
        found = torch.func.functional_call(self, there, args, named)
        return tree_map_only(Tensor, lambda tensor: tensor.to(home), found)


def _product_in_tiles(layer: nn.Linear, device: torch.device, x: Tensor) -> Tensor:
    """Return what a linear layer does, where it is, computed on a device in tiles of its rows."""
    weight, bias = layer.weight.detach(), layer.bias
    rows = max(1, TILE_BYTES // (weight.shape[1] * weight.element_size()))
    tiles = weight.split(rows)
    biases = [None] * len(tiles) if bias is None else bias.detach().split(rows)
    there = x.to(device)
    # Each part goes home before the next one is there.
    parts = [
        checkpoint(_product, there, tile, shift, **RECOMPUTED).to(weight.device) for tile, shift in zip(tiles, biases)
    ]
    return torch.cat(parts, -1)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(x, weight.to(x.device), None if bias is None else bias.to(x.device))
