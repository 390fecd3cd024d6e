"""The bytes that training holds beside the weights, counted from moment to moment."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.flow import ExpertsAdamW


class _Saved:
    """A tensor that waits for the backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class TrainingBytes:
    """Counts activations saved for the backward, gradients, and moments in the device's slots of the store.

    most: the largest sum of the three at one moment; each: the most of every one. Looked at whenever one of them grows.
    """

    def __init__(self, model: nn.Module, optimizer: ExpertsAdamW) -> None:
        self._model, self._optimizer = model, optimizer
        self._store: Any = optimizer.store
        self._uses: Counter[int] = Counter()
        self._saved: dict[int, int] = {}
        self.most, self.each = 0, (0, 0, 0)

    def _pack(self, tensor: Tensor) -> _Saved:
        storage = tensor.untyped_storage()
        key, kept = storage.data_ptr(), _Saved(tensor)
        if all(key != param.untyped_storage().data_ptr() for param in self._model.parameters()):
            self._uses[key] += 1
            self._saved[key] = storage.nbytes()
            weakref.finalize(kept, self._forget, key)
            self._look()
        return kept

    def _forget(self, key: int) -> None:
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._saved[key]

    def _look(self, *_: Any) -> None:
        grads = sum(param.grad.nbytes for param in self._model.parameters() if param.grad is not None)
        now = sum(self._saved.values()), grads, self._moments()
        self.most = max(self.most, sum(now))
        self.each = max(self.each[0], now[0]), max(self.each[1], now[1]), max(self.each[2], now[2])

    def _moments(self) -> int:
        if self._store is not None:
            return self._store.device_bytes(torch.device("cpu"))
        return sum(tensor.nbytes for state in self._optimizer.state.values() for tensor in state.values())

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what happens inside."""
        if self._store is not None:
            self._store.watchers.append(self._look)
        trained = [param for param in self._model.parameters() if param.requires_grad]
        hooks = [param.register_post_accumulate_grad_hook(self._look) for param in trained]
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
            yield
        for hook in hooks:
            hook.remove()
        if self._store is not None:
            self._store.watchers.remove(self._look)
