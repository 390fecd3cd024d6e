"""The cases of the optimizer benchmark: what is stepped, by whom, and the row that comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bench.held_bytes import extra_bytes, state_bytes
from bench.peers import DTYPES, Contestant
from bench.timing import Spread, seconds_per_call

LEAST_ROUNDS, SECONDS_PER_CONTESTANT, SECONDS_PER_READING = 5, 1.0, 5e-3
PATTERN_ELEMENTS, COLUMNS = 1 << 20, 64


@dataclass(frozen=True)
class Case:
    """What is stepped: equal matrices on one device."""

    device: str
    elements_each: int
    tensors: int = 1

    @property
    def elements(self) -> int:
        """Elements of all tensors together."""
        return self.elements_each * self.tensors

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of each matrix."""
        columns = COLUMNS if self.elements_each % COLUMNS == 0 else self.elements_each
        return self.elements_each // columns, columns

    def params(self, dtype: torch.dtype) -> list[nn.Parameter]:
        """Return weights with their gradients set: the sizes of numbers are a network's, the values repeat."""
        generator = torch.Generator().manual_seed(0)
        pattern = torch.randn(min(self.elements_each, PATTERN_ELEMENTS), generator=generator).to(self.device, dtype)
        params = []
        for _ in range(self.tensors):
            # A matrix, because vectors keep 32-bit moments.
            tiled = pattern.repeat(-(-self.elements_each // len(pattern)))[: self.elements_each].view(self.shape)
            param = nn.Parameter(tiled * 0.02)
            param.grad = tiled.mul_(1e-3)
            params.append(param)
        return params


@dataclass(frozen=True)
class Entry:
    """A contestant with the dtype of weights and gradients that it runs with."""

    contestant: Contestant
    dtype: str

    def __str__(self) -> str:
        return f"{self.contestant.name}-{self.dtype}"

    def moment_bytes(self) -> float:
        """Return about how many bytes its two moments take per element."""
        given = self.contestant.moment_bytes
        return 2 * DTYPES[self.dtype].itemsize if given is None else given


@dataclass(frozen=True)
class Row:
    """One line of the result: numbers, or the reason why there are none."""

    device: str
    elements: int
    tensors: int
    dtype: str
    optimizer: str
    name: str
    reason: str | None = None
    rounds: int = 0
    steps_per_round: int = 0
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    ns_per_element: float | None = None
    moved_bytes_per_element: float | None = None  # weight and state read and written once, the gradient read once
    gb_s: float | None = None
    copy_gb_s: float | None = None
    copy_share: float | None = None
    ratio_to_torch_fused_fp32: float | None = None
    state_bytes_per_element: float | None = None
    extra_bytes: int | None = None


class Running:
    """An entry with its optimizer built, warmed up, and its number of rounds chosen."""

    def __init__(self, entry: Entry, case: Case, params: list[nn.Parameter], rounds: int) -> None:
        self.entry, self.case = entry, case
        self.optimizer: Optimizer = entry.contestant.start(params)
        # The first step allocates and compiles.
        self.optimizer.step()
        step_seconds = min(seconds_per_call(self.optimizer.step, case.device) for _ in range(2))
        self.steps_per_round = max(1, int(SECONDS_PER_READING / step_seconds))
        affordable = int(SECONDS_PER_CONTESTANT / (step_seconds * self.steps_per_round))
        self.rounds = min(rounds, max(LEAST_ROUNDS, affordable))

    def read_clock(self) -> float:
        """Return the seconds of one step."""
        return seconds_per_call(self.optimizer.step, self.case.device, self.steps_per_round)

    def row(self, times: Spread, copy_gb_s: float, yardstick: Spread | None) -> Row:
        """Return the numbers; `yardstick` is what fused torch took with fp32 weights."""
        state = state_bytes(self.optimizer) / self.case.elements
        moved = 3 * DTYPES[self.entry.dtype].itemsize + 2 * state
        gb_s = moved * self.case.elements / times.p50 / 1e9
        return Row(
            **identity(self.case, self.entry),
            rounds=self.rounds,
            steps_per_round=self.steps_per_round,
            p20_ms=times.p20 * 1e3,
            p50_ms=times.p50 * 1e3,
            p80_ms=times.p80 * 1e3,
            ns_per_element=times.p50 * 1e9 / self.case.elements,
            moved_bytes_per_element=moved,
            gb_s=gb_s,
            copy_gb_s=copy_gb_s,
            copy_share=gb_s / copy_gb_s,
            ratio_to_torch_fused_fp32=times.p50 / yardstick.p50 if yardstick else None,
            state_bytes_per_element=state,
            extra_bytes=extra_bytes(self.optimizer.step, self.case.device),
        )


def identity(case: Case, entry: Entry) -> dict[str, Any]:
    """Return the fields of a row that say what was measured."""
    return {
        "device": case.device,
        "elements": case.elements,
        "tensors": case.tensors,
        "dtype": entry.dtype,
        "optimizer": entry.contestant.title,
        "name": entry.contestant.name,
    }


def why_not(entry: Entry, case: Case, limits: bool = True) -> str | None:
    """Return why the entry does not run, before anything is built, or None."""
    reason = entry.contestant.unavailable(case.device)
    if reason is None and limits:
        reason = entry.contestant.too_slow(case.device, case.elements, case.tensors)
    return reason


def start(entry: Entry, case: Case, params: list[nn.Parameter], rounds: int) -> Running | str:
    """Build the entry and take its first steps; returns the reason where a peer cannot."""
    try:
        return Running(entry, case, params, rounds)
    except Exception as error:
        if not entry.contestant.is_peer:
            raise
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
