"""What a run leaves of itself as it goes: one line of JSON for each thing that happened, in history.jsonl.

Lines have `kind` and `step`, the number of steps taken before: "begin" (what the run is), "draw" (the layers of a
period), "log" (loss, rate, gradient norm, speed, memory), "evaluation" (held-out loss), "answers" (what it says).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_kernels.errors import InputError
from lisa_kernels.layers import SlotModule
from lisa_kernels.methods import SampledAdamW
from lisa_kernels.report import HISTORY_FILE, read_lines
from lisa_kernels.train.memory import MemoryMeter

_LOGGED = ("loss", "learning_rate", "grad_norm")


class RunHistory(TrainerCallback):  # type: ignore[misc]
    """Writes the history of a run beside its summary; a line is whole or, where a kill cut it, the last and left out.

    A file that cannot be written is told of once and costs the run nothing but its curves.
    """

    def __init__(
        self, folder: Path, optimizer: SampledAdamW, meter: MemoryMeter, tokens_per_step: float, console: Console
    ) -> None:
        self.path, self.optimizer, self.meter = folder / HISTORY_FILE, optimizer, meter
        self.tokens_per_step, self.console = tokens_per_step, console
        self.lines: list[dict[str, Any]] = []
        self._seconds = self._logged_seconds = 0.0
        self._logged_step = 0
        self._held: dict[str, int] = {}
        self._started = 0.0
        self._writes = True

    def begin(self, facts: dict[str, Any], steps: int) -> None:
        """Open the history of a run that has taken `steps`: lines past them go, those of an earlier start stay."""
        lines = self._earlier() if steps else []
        # What the model says at the end is asked again at the end.
        self.lines = [
            line for line in lines if line["step"] <= steps and (line["kind"], line["step"]) != ("answers", steps)
        ]
        logs = [line for line in self.lines if line["kind"] == "log"]
        if logs:
            self._seconds = self._logged_seconds = logs[-1]["seconds"]
        self._logged_step = steps
        if not self.has("begin"):
            self.lines.insert(0, {"kind": "begin", "step": 0, **_plain(facts)})
        self._write("w", self.lines)

    def _earlier(self) -> list[dict[str, Any]]:
        try:
            return read_lines(self.path) if self.path.exists() else []
        except (InputError, OSError) as error:
            self.console.print(f"note: the history of this run begins anew ({error})", highlight=False, markup=False)
            return []

    def has(self, kind: str) -> bool:
        """Tell whether there is a line of that kind."""
        return any(line["kind"] == kind for line in self.lines)

    def add(self, kind: str, step: int, **values: Any) -> None:
        """Write one line."""
        line = {"kind": kind, "step": step, **_plain(values)}
        self.lines.append(line)
        self._write("a", [line])

    def _write(self, mode: str, lines: Iterable[dict[str, Any]]) -> None:
        if not self._writes:
            return
        try:
            self._write_lines(mode, lines)
        except OSError as error:
            self._writes = False
            self.console.print(f"note: the history of this run is not written on ({error})", highlight=False)

    def _write_lines(self, mode: str, lines: Iterable[dict[str, Any]]) -> None:
        path = self.path.with_name(f".{self.path.name}.partial") if mode == "w" else self.path
        with path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        if mode == "w":
            os.replace(path, self.path)

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


def _plain(value: Any) -> Any:
    """Return the value as JSON can hold it: numbers that are none become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def held_bytes(model: nn.Module, optimizer: SampledAdamW) -> dict[str, int]:
    """Return the bytes that model and optimizer hold on the model's device, by a plan's categories.

    A storage counts once.
    """
    device = next(model.parameters()).device
    layers = [module for module in model.modules() if isinstance(module, SlotModule)]
    states: list[Any] = list(optimizer.state.values())
    groups: dict[str, Iterable[Any]] = {
        "bases": [tensor for layer in layers for tensor in (layer.slot, layer.basis, layer.remainder)],
        "weights": [*model.parameters(), *model.buffers()],
        "optimizer state": [tensor for state in states for tensor in state.values()],
        "gradients": [param.grad for param in model.parameters()],
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
