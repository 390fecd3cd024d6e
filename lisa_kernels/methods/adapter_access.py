"""What an attached model's optimizer does with adapters beside training: files, and in and out of the weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from lisa_kernels.errors import InputError
from lisa_kernels.methods.adapters import Adapters
from lisa_kernels.methods.definitions import Method
from lisa_kernels.methods.peft_folder import read_adapter, write_adapter
from lisa_kernels.methods.units import Layout
from lisa_kernels.optim import AdamW8bit


class AdapterAccess(AdamW8bit):
    """The part of `SampledAdamW` that users of LoRA and LoRA-FA call; with other methods each call says so.

    _adapters: None of other methods; _guard: None once detached.
    """

    method: Method
    layout: Layout
    _adapters: Adapters | None
    _guard: Any

    def _attached_adapters(self) -> Adapters:
        if self._adapters is None:
            raise InputError(
                f"method {self.method.name!r} has no adapters; attach the model with LoRA(...) or LoRAFA(...)."
            )
        if self._guard is None:
            raise InputError("this optimizer was detached, its adapters are in the weights; attach the model again.")
        return self._adapters

    def _check_unmerged(self) -> None:
        if self._adapters is not None and self._adapters.merged:
            raise InputError("the adapters are merged into the weights; call unmerge() on the optimizer first.")

    @torch.no_grad()
    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapters, and a new head if there is one, as a folder that peft loads; whole or not at all.

        A folder that holds an adapter and nothing else is replaced. Raises InputError for one that holds more, for
        methods other than LoRA and LoRAFA, where weights were loaded that hold the adapters already, and where the
        embeddings were trained too, which are in the weights.
        """
        adapters = self._attached_adapters()
        if len(adapters.layers) < len(self.layout.always.lowrank):
            raise InputError(
                "the embeddings were trained into the weights of this model, and its adapters alone are not what was "
                "trained: save the whole model, and make an adapter of it with lisa-kernels difference."
            )
        if any(layer.restarted for layer in adapters.layers.values()):
            raise InputError(
                "weights were loaded into this model that hold its adapters, so that the adapters alone are no longer "
                "known: save the whole model, or load the optimizer's state as well."
            )
        write_adapter(adapters, Path(folder))

    @torch.no_grad()
    def load_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Take over a LoRA adapter of the same rank and layers, by peft or by `save_adapter`; the moments start anew.

        LoRA-FA splits an A that is not orthonormal, so that the product and with it the model's function are the
        adapter's. Raises InputError, the model untouched, for what does not fit.
        """
        adapters = self._attached_adapters()
        self._check_unmerged()
        read_adapter(adapters, Path(folder))
        self.retire(self.layout.always.params())

    @torch.no_grad()
    def merge(self) -> None:
        """W ← W + scale · Bᵀ A until `unmerge()`: the model runs as fast as a plain one, and cannot train.

        A copy of the weights with adapters goes to host memory, so that `unmerge()` is exact in every dtype. `detach()`
        merges for good and copies nothing.
        """
        self._attached_adapters().merge()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put weights and adapters back as they were before `merge()`, bit for bit."""
        self._attached_adapters().unmerge()
