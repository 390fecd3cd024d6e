"""The update of one matrix in low rank: optimizer, fold, and the refresh of its basis spread over the steps between."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, NamedTuple

from torch import Tensor, nn

from bench.lowrank_cases import Case
from bench.lowrank_layers import low_rank
from bench.step_contestants import captures
from bench.timing import seconds_of_parts, spread

LR = 1e-6
# Here every second step refreshes the basis, so that both kinds of step are timed.
SHORT_GAP = 2
# Rows · columns · the smaller of them: an SVD of more takes a CPU minutes.
MOST_SVD_WORK = 1 << 32
SECONDS_PER_UPDATE, LEAST_ROUNDS = 5.0, 2


class Reading(NamedTuple):
    """Seconds of an ordinary step's optimizer, and what a step that refreshes the basis takes beyond it."""

    optimizer: float
    refresh: float


@dataclass(frozen=True)
class Contestant:
    """One way to update a matrix: its clock, whose it is, and whether it decomposes the whole gradient."""

    name: str
    title: str
    start: Callable[[Case, Tensor], Callable[[], Reading]]
    package: str = "lisa_kernels"
    decomposes: bool = False

    def unavailable(self, case: Case, limits: bool) -> str | None:
        """Return why it does not run, or None."""
        if find_spec(self.package) is None:
            return f"not installed: pip install {self.package.replace('_', '-')}"
        work = case.inputs * case.outputs * min(case.inputs, case.outputs)
        if limits and self.decomposes and case.device == "cpu" and work > MOST_SVD_WORK:
            return "slow: its SVD takes a CPU minutes (--no-limits)"
        return None


@dataclass(frozen=True)
class UpdateRow:
    """One way to update one matrix: numbers, or the reason why there are none.

    update_ms is optimizer_ms, with the fold, and the `gap`th part of refresh_ms, which a refresh takes beyond that.
    """

    device: str
    dtype: str
    inputs: int
    outputs: int
    name: str
    update: str
    settings: str
    part: str = "update"
    reason: str | None = None
    tokens: int = 0
    rounds: int = 0
    optimizer_ms: float | None = None
    optimizer_p20_ms: float | None = None
    optimizer_p80_ms: float | None = None
    refresh_ms: float | None = None
    update_ms: float | None = None
    ratio_to_galore_torch: float | None = None


def _attached(case: Case, weight: Tensor) -> Callable[[], Reading]:
    """Return the clock of an attached layer, whose backward gives the gradient in the basis."""
    model, optimizer = low_rank(case, weight, SHORT_GAP)
    x, dy = case.numbers(case.tokens, case.inputs).requires_grad_(), case.numbers(case.tokens, case.outputs)

    def step() -> tuple[bool, float, float]:
        refreshes, y = bool(captures(model)), model(x)
        backward, update = seconds_of_parts((lambda: y.backward(dy), optimizer.step), case.device)
        optimizer.zero_grad()
        return refreshes, backward + update, update

    step()

    def read() -> Reading:
        whole: dict[bool, float] = {}
        while len(whole) < 2:
            refreshes, seconds, update = step()
            whole[refreshes] = seconds
            if not refreshes:
                ordinary = update
        return Reading(ordinary, whole[True] - whole[False])

    return read


def _with_full_gradient(module: str, name: str, **settings: Any) -> Callable[[Case, Tensor], Callable[[], Reading]]:
    """Return how an optimizer that takes galore-torch's groups is timed on a full gradient."""

    def start(case: Case, weight: Tensor) -> Callable[[], Reading]:
        param = nn.Parameter(weight)
        gradient = case.numbers(case.outputs, case.inputs, scale=1e-3)
        group = {
            "params": [param], "rank": case.rank, "update_proj_gap": SHORT_GAP, "scale": 1.0, "proj_type": "std"
        }  # fmt: skip
        optimizer = getattr(importlib.import_module(module), name)([group], lr=LR, **settings)

        def read() -> Reading:
            param.grad = gradient.clone()
            first = seconds_of_parts((optimizer.step,), case.device)[0]
            param.grad = gradient.clone()
            second = seconds_of_parts((optimizer.step,), case.device)[0]
            # Whichever of two steps in a row the refresh falls into.
            return Reading(min(first, second), abs(first - second))

        return read

    return start


PEER = "galore-torch"
CONTESTANTS = (
    Contestant("attached", "GaLore(), attached", _attached),
    Contestant("drop-in", "GaLoreAdamW8bit", _with_full_gradient("lisa_kernels", "GaLoreAdamW8bit")),
    Contestant(
        PEER, "galore-torch GaLoreAdamW",
        _with_full_gradient("galore_torch", "GaLoreAdamW", no_deprecation_warning=True), "galore_torch", True,
    ),
)  # fmt: skip


class RunningUpdate:
    """An update's clock, warmed up, its number of rounds chosen."""

    def __init__(self, contestant: Contestant, case: Case, weight: Tensor, rounds: int) -> None:
        self.contestant, self.case, self.readings = contestant, case, list[Reading]()
        self.read = contestant.start(case, weight)
        seconds = seconds_of_parts((self.read,), case.device)[0]
        self.rounds = min(rounds, max(LEAST_ROUNDS, int(SECONDS_PER_UPDATE / seconds)))

    def read_clock(self) -> float:
        """Take an ordinary step and one with a refresh, note both, and return the seconds of the ordinary one."""
        self.readings.append(self.read())
        return self.readings[-1].optimizer

    def row(self) -> UpdateRow:
        """Return the numbers, without the ratio."""
        times = spread([reading.optimizer for reading in self.readings])
        refresh = max(0.0, statistics.median(reading.refresh for reading in self.readings))
        return UpdateRow(
            **identity(self.contestant, self.case),
            rounds=len(self.readings),
            optimizer_ms=times.p50 * 1e3,
            optimizer_p20_ms=times.p20 * 1e3,
            optimizer_p80_ms=times.p80 * 1e3,
            refresh_ms=refresh * 1e3,
            update_ms=(times.p50 + refresh / self.case.gap) * 1e3,
        )


def identity(contestant: Contestant, case: Case) -> dict[str, Any]:
    """Return the fields of a row that say what was measured."""
    return {
        "device": case.device,
        "dtype": case.dtype,
        "inputs": case.inputs,
        "outputs": case.outputs,
        "tokens": case.tokens,
        "name": contestant.name,
        "update": contestant.title,
        "settings": f"rank {case.rank}, gap {case.gap}",
    }


def with_ratios(rows: list[UpdateRow]) -> list[UpdateRow]:
    """Return the rows of one case, each beside galore-torch's."""
    base = next((row.update_ms for row in rows if row.name == PEER), None)
    return [
        replace(row, ratio_to_galore_torch=row.update_ms / base if base and row.update_ms is not None else None)
        for row in rows
    ]
