"""With frozen embeddings nothing below the lowest active layer is in the graph, with gradient checkpointing on too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import DECODERS, llama, tokens
from torch import nn

from lisa_kernels import LISA, BAdam, OwLore, attach
from lisa_kernels.layers import find_blocks
from lisa_kernels.methods import Method

FROZEN: dict[str, Method] = {
    "lisa": LISA(active_layers=1, period=1, embeddings="frozen"),
    "owlore": OwLore(active_layers=1, period=1, rank=4, scores="uniform", embeddings="frozen"),
    "badam": BAdam(period=1),
}


def plain(model: Any) -> None:
    """Leave the model as it is."""


def checkpointing(model: Any) -> None:
    """Switch checkpointing on as the Trainer does; this installs the hook that makes embeddings require gradients."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class Counter:
    """Counts, for each block, backwards through it and runs of its first linear layer."""

    def __init__(self, model: nn.Module) -> None:
        _, blocks = find_blocks(model)
        self.backwards, self.runs = [0] * len(blocks), [0] * len(blocks)
        for index, block in enumerate(blocks):
            block.register_full_backward_hook(self._add(self.backwards, index))
            norm = next(part for part in block.modules() if "norm" in type(part).__name__.lower())
            norm.register_forward_pre_hook(self._add(self.runs, index))

    @staticmethod
    def _add(counts: list[int], index: int) -> Callable[..., None]:
        def add(*args: object) -> None:
            counts[index] += 1

        return add


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("enable", [plain, checkpointing], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", FROZEN)
def test_backward_stops_at_the_lowest_active_layer(method: str, enable: Callable[[Any], None]) -> None:
    """Blocks from the lowest active one up run backward (and are recomputed) once; those below not at all."""
    model = llama(layers=5)
    optimizer = attach(model, FROZEN[method])
    enable(model)
    lowest = set()
    for seed in range(6):
        counter = Counter(model)
        lowest.add(optimizer.active_layers[0])
        above = [index >= optimizer.active_layers[0] for index in range(5)]
        model(**tokens(seed=seed)).loss.backward()
        assert counter.backwards == [int(inside) for inside in above]
        recomputed = enable is checkpointing
        assert counter.runs == [2 if inside and recomputed else 1 for inside in above]
        optimizer.step()
        optimizer.zero_grad()
    assert len(lowest) > 1


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_without_the_guard_every_layer_runs() -> None:
    """Negative control: the same flags on a plain model with Hugging Face's hook run all five blocks backward."""
    model = llama(layers=5)
    model.requires_grad_(False)
    model.model.layers[3].requires_grad_(True)
    checkpointing(model)
    counter = Counter(model)
    model(**tokens()).loss.backward()
    assert counter.backwards == [1] * 5
    assert counter.runs == [2] * 5


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "opt", "falcon", "mixtral", "gemma2", "llava"])
def test_families_truncate_with_checkpointing(name: str) -> None:
    """In other families too the embeddings' output needs no gradient and lower blocks are not recomputed."""
    model = DECODERS[name].make()
    optimizer = attach(model, LISA(active_layers=1, period=1, embeddings="frozen"))
    checkpointing(model)
    for seed in range(3):
        counter = Counter(model)
        lowest = optimizer.active_layers[0]
        model(**tokens(seed=seed)).loss.backward()
        assert counter.runs == [1 + (index >= lowest) for index in range(3)]
        optimizer.step()
        optimizer.zero_grad()


def test_less_is_saved_for_backward_the_higher_the_layer() -> None:
    """Bytes kept for the backward fall with the height of the lowest active layer."""
    saved = []
    for layer in range(4):
        model = llama(layers=4)
        scores = tuple(float(index == layer) + 1e-9 for index in range(4))
        method = OwLore(active_layers=1, rank=4, scores=scores, embeddings="frozen")
        optimizer = attach(model, method)
        assert optimizer.active_layers == [layer]
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**tokens()).loss.backward()
        saved.append(sum(seen.values()))
    assert saved == sorted(saved, reverse=True)
    assert saved[3] < 0.6 * saved[0]
