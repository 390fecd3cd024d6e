"""A backward that finds bases holds one gradient at a time, and none where its factors are cheaper."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lisa_kernels.basis import BasisTracker
from lisa_kernels.layers import LowRankLinear

SIDE, RANK, LAYERS, WIDTH = 64, 15, 4, 31
GRADIENT_BYTES = 4 * SIDE * SIDE


class LiveStorages(TorchDispatchMode):
    """Follows the bytes of all storages made under it, and how many as large as a gradient live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak_bytes = self.most_gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._watch(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, sum(self.live.values()))
        large = sum(size >= GRADIENT_BYTES for size in self.live.values())
        self.most_gradients = max(self.most_gradients, large)
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, key, None)


def stack(gap: int = 1) -> nn.Sequential:
    """Return layers whose bases are due."""
    torch.manual_seed(0)
    trackers = [BasisTracker(RANK, gap, 0, seed=0, stream=index) for index in range(LAYERS)]
    layers = [LowRankLinear(nn.Linear(SIDE, SIDE, bias=False), RANK, tracker=tracker) for tracker in trackers]
    for layer in layers:
        layer.weight.requires_grad_(False)
        layer.activate()
        layer.slot.requires_grad_(True)
        layer.arm()
    return nn.Sequential(*layers)


def measured(model: nn.Module, tokens: int) -> LiveStorages:
    """Return what a forward and backward over so many tokens made."""
    x = torch.randn(tokens, SIDE)
    with LiveStorages() as live:
        model(x).square().sum().backward()
    model.zero_grad()
    return live


def refreshing(model: nn.Sequential, tokens: int) -> LiveStorages:
    """Return what a backward makes in which every basis is refreshed."""
    measured(model, tokens)
    for layer in model:
        assert isinstance(layer, LowRankLinear)
        assert layer.tracker is not None
        layer.tracker.advance()
        layer.arm()
        assert layer.capturing
    return measured(model, tokens)


FIRST: Callable[[nn.Sequential, int], LiveStorages] = measured
both_kinds = pytest.mark.parametrize("run", [FIRST, refreshing], ids=["first bases", "refreshes"])
# Below 44 tokens the factors are cheaper for a first basis, above it the gradient; a refresh always takes the factors.
FEW, MANY = 40, 60


@both_kinds
def test_no_gradient_is_formed_where_its_factors_are_cheaper(run: Callable[[nn.Sequential, int], LiveStorages]) -> None:
    assert run(stack(), FEW).most_gradients == 0


def test_never_two_gradients_live_at_once() -> None:
    assert measured(stack(), MANY).most_gradients == 1


def test_gradients_that_are_kept_are_counted() -> None:
    """Negative control: plain layers, whose gradients stay until the step."""
    plain = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))
    assert measured(plain, FEW).most_gradients == LAYERS


@both_kinds
@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["factors", "formed"])
def test_finding_bases_takes_one_matrix_and_some_sketches_more(
    run: Callable[[nn.Sequential, int], LiveStorages], tokens: int
) -> None:
    """Inputs are saved whole then, in place of their projections; the rest does not grow with the number of layers."""
    model = stack(gap=1)
    peak = run(model, tokens).peak_bytes
    for layer in model:
        assert isinstance(layer, LowRankLinear)
        layer.arm()
        assert not layer.capturing
    ordinary = measured(model, tokens).peak_bytes
    saved = LAYERS * 4 * tokens * (SIDE - RANK)
    sketch = WIDTH * SIDE * 8
    assert ordinary < peak <= ordinary + saved + GRADIENT_BYTES + 4 * sketch
