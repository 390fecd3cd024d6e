"""The history of a run of transformers' Trainer; see `history_file`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_kernels.distributed.shards import local
from lisa_kernels.layers import AccumulatingSlot, SlotModule
from lisa_kernels.methods import SampledAdamW
from lisa_kernels.train.history_file import HistoryFile
from lisa_kernels.train.memory import MemoryMeter

_LOGGED = ("loss", "learning_rate", "grad_norm")


class RunHistory(HistoryFile, TrainerCallback):  # type: ignore[misc]
    """Writes losses, rates, speed, memory and draws of layers as the run goes."""

    def __init__(
        self, folder: Path, optimizer: SampledAdamW, meter: MemoryMeter, tokens_per_step: float, console: Console
    ) -> None:
        super().__init__(folder, console)
        self.optimizer, self.meter, self.tokens_per_step = optimizer, meter, tokens_per_step
        self._seconds = self._logged_seconds = 0.0
        self._logged_step = 0
        self._held: dict[str, int] = {}
        self._started = 0.0

    def begin(self, facts: dict[str, Any], steps: int) -> None:
        """Open the history, and go on counting where an earlier start left off."""
        super().begin(facts, steps)
        logs = [line for line in self.lines if line["kind"] == "log"]
        if logs:
            self._seconds = self._logged_seconds = logs[-1]["seconds"]
        self._logged_step = steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time, and the layers of a period that begins."""
        self._started = time.perf_counter()
        drawn = sum(line["kind"] == "draw" for line in self.lines)
        for layers in self.optimizer.history[drawn:]:
            self.add("draw", state.global_step, layers=layers)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the tensors that are held where gradients are there too, in steps that will be logged."""
        if state.global_step == 0 or (state.global_step + 1) % args.logging_steps == 0:
            self._held = held_bytes(self.optimizer.model, self.optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the time."""
        self._seconds += time.perf_counter() - self._started

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what transformers logs, with speed and memory."""
        logs = kwargs.get("logs") or {}
        if "eval_loss" in logs:
            self.add("evaluation", state.global_step, loss=logs["eval_loss"])
        if "loss" in logs:
            steps, seconds = state.global_step - self._logged_step, self._seconds - self._logged_seconds
            speed = steps * self.tokens_per_step / seconds if seconds > 0 else None
            self._logged_step, self._logged_seconds = state.global_step, self._seconds
            self.add(
                "log", state.global_step, **{name: logs.get(name) for name in _LOGGED}, seconds=self._seconds,
                tokens_per_second=speed, held_bytes=self._held, peak_bytes=self.meter.peak_bytes(),
            )  # fmt: skip


def held_bytes(model: nn.Module, optimizer: SampledAdamW) -> dict[str, int]:
    """Return the bytes that model and optimizer hold on the model's device, by a plan's categories.

    A storage counts once, and masters that are mapped from files not at all.
    """
    device = next(model.parameters()).device
    layers = [module for module in model.modules() if isinstance(module, SlotModule)]
    mapped = {layer.stored_weight for layer in layers if isinstance(layer, AccumulatingSlot) and layer.is_mapped}
    states: list[Any] = list(optimizer.state.values())
    streamed = optimizer.layout.streamed
    pages = [] if streamed is None else [*streamed.held(), *streamed.homes()]
    own = [local(param) for param in model.parameters() if param not in mapped]
    groups: dict[str, Iterable[Any]] = {
        "bases": [tensor for layer in layers for tensor in (layer.slot, layer.basis, layer.remainder)],
        "weights": [*own, *model.buffers(), *pages],
        "optimizer state": [*(tensor for state in states for tensor in state.values()), *(optimizer._counters or ())],
        "gradients": [local(param.grad) for param in model.parameters() if param.grad is not None],
    }
    seen, totals = set[int](), dict[str, int]()
    for category, tensors in groups.items():
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tensors
            if isinstance(tensor, Tensor) and tensor.device == device and tensor.layout == torch.strided
        }
        totals[category] = sum(size for pointer, size in storages.items() if pointer not in seen)
        seen |= storages.keys()
    return totals
