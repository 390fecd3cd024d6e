"""One contestant's steps in the step benchmark, and the row that comes of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.held_bytes import extra_bytes, held_bytes, saved_for_backward
from bench.step_cases import Case
from bench.step_contestants import FULL, LORA, PLAIN_STEPS, Contestant, Trainee, captures
from bench.timing import seconds_of_parts, spread


class Step(NamedTuple):
    """Seconds of one step's parts."""

    forward: float
    backward: float
    optimizer: float

    @property
    def whole(self) -> float:
        """Seconds of all parts."""
        return self.forward + self.backward + self.optimizer


class Finding(NamedTuple):
    """A step that may find bases: its seconds, and how many it finds."""

    seconds: float
    bases: int


class Draw(NamedTuple):
    """The steps between two switches: one like all others, the first two, and what the last takes for the switch.

    wall: seconds of a plain step by the clock on the wall.
    """

    plain: Step
    first: Finding
    second: Finding
    switch: float
    lowest_layer: int | None
    saved_bytes: int
    held_bytes: int
    wall: float = 0.0


@dataclass(frozen=True)
class Row:
    """One line of the result: numbers, or the reason why there are none.

    Milliseconds are means over rounds, which for methods that switch layers are draws, of each round's middle step;
    step_ms is the sum of the four parts, refresh_ms what new bases and switches add per step over a true period. clock:
    "process", of one thread's own time, or "wall"; wall_ms: of a step without what refresh_ms is. saved_bytes: what
    autograd keeps for the backward; state_bytes: what stays from step to step beside the weights; peak_bytes: weights,
    state and the most a step holds beyond them.
    """

    device: str
    dtype: str
    geometry: str
    batch: int
    seq_len: int
    name: str
    method: str
    settings: str
    reason: str | None = None
    rounds: int = 0
    forward_ms: float | None = None
    backward_ms: float | None = None
    optimizer_ms: float | None = None
    refresh_ms: float | None = None
    step_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    tokens_per_s: float | None = None
    ratio_to_peft_lora: float | None = None
    ratio_to_full: float | None = None
    clock: str = "wall"
    wall_ms: float | None = None
    wall_ratio_to_peft_lora: float | None = None
    lowest_layer: float | None = None
    expected_lowest_layer: float | None = None
    saved_bytes: float | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None


class Running:
    """A contestant that has taken its first steps, and what its clock has read."""

    def __init__(self, contestant: Contestant, case: Case, trainee: Trainee, batch: dict[str, Tensor]) -> None:
        self.contestant, self.case, self.trainee, self.batch = contestant, case, trainee, batch
        self.loss: Tensor | None = None
        self.draws: list[Draw] = []
        # The first step allocates; where nothing is ever switched it is also the one that finds the bases.
        self.first, self.second = self._finding_step(), self._finding_step()
        for _ in range(trainee.warmup - 2):
            self._settle()
            self._step()
        self._settle()
        self.saved_bytes = self._step_with_saved_bytes()[1] if trainee.cycle == 1 else 0
        self._settle()

    def _forward(self) -> None:
        self.loss = self.trainee.model(**self.batch).loss

    def _backward(self) -> None:
        assert self.loss is not None
        self.loss.backward()
        self.loss = None

    def _update(self) -> None:
        self.trainee.optimizer.step()
        self.trainee.optimizer.zero_grad()

    def _step(self) -> Step:
        return Step(*seconds_of_parts((self._forward, self._backward, self._update), self.case.device))

    def _finding_step(self) -> Finding:
        bases = len(captures(self.trainee.model))
        return Finding(self._step().whole, bases)

    def _settle(self) -> None:
        """Let no basis be found in the next step: those of a period are counted apart."""
        for layer in captures(self.trainee.model):
            layer.capturing = False  # type: ignore[assignment]

    def _step_with_saved_bytes(self) -> tuple[Step, int]:
        model = self.trainee.model
        with saved_for_backward([*model.parameters(), *model.buffers()]) as saved:
            step = self._step()
        return step, sum(saved.values())

    def _held_bytes(self) -> int:
        model = self.trainee.model
        return held_bytes([*model.parameters(), *model.buffers(), *self.trainee.kept_tensors()])

    def read_clock(self) -> float:
        """Take the steps of one draw, note them, and return the seconds of a plain step."""
        if self.trainee.cycle == 1:
            plain, wall = self._plain_step()
            lowest, held = self.trainee.lowest_layer(), self._held_bytes()
            self.draws.append(Draw(plain, self.first, self.second, 0.0, lowest, self.saved_bytes, held, wall))
            return plain.whole
        first, second = self._finding_step(), self._finding_step()
        self._settle()
        plain, wall = self._plain_step()
        lowest, held = self.trainee.lowest_layer(), self._held_bytes()
        last, saved = self._step_with_saved_bytes()
        switch = last.optimizer - plain.optimizer
        self.draws.append(Draw(plain, first, second, switch, lowest, saved, held, wall))
        return plain.whole

    def _plain_step(self) -> tuple[Step, float]:
        """Take some steps that find no basis; returns the middle one, and the middle of their seconds on the wall."""
        steps, walls = [], []
        for _ in range(PLAIN_STEPS):
            begin = time.perf_counter()
            steps.append(self._step())
            walls.append(time.perf_counter() - begin)
            self._settle()
        return sorted(steps, key=lambda step: step.whole)[PLAIN_STEPS // 2], statistics.median(walls)

    def _refresh_seconds(self) -> float:
        """Return what new bases, new state and switches add to each step of a true period."""
        trainee, mean = self.trainee, statistics.mean
        if trainee.period is None:
            return 0.0
        first = mean(draw.first.seconds - draw.plain.whole for draw in self.draws)
        again = mean(draw.second.seconds - draw.plain.whole for draw in self.draws)
        bases, bases_again = (
            mean(draw.first.bases for draw in self.draws),
            mean(draw.second.bases for draw in self.draws),
        )
        # Found again costs other than found first; where no second step does it, as much.
        each = again / bases_again if bases_again else first / bases if bases else 0.0
        if trainee.matrices:
            whole = trainee.matrices * each
        else:
            whole = first + trainee.repeats * bases * each + mean(draw.switch for draw in self.draws)
        return max(0.0, whole) / trainee.period

    def row(self) -> Row:
        """Return the numbers, without ratios."""
        switches = self.trainee.cycle > 1
        plain = Step(*(statistics.mean(getattr(draw.plain, part) for draw in self.draws) for part in Step._fields))
        refresh = self._refresh_seconds()
        step, wholes = plain.whole + refresh, spread([draw.plain.whole for draw in self.draws])
        named = self.trainee.model.named_parameters()
        weights = held_bytes(param for name, param in named if _is_weight(name))
        peak = self._held_bytes() + extra_bytes(self._peak_steps, self.case.device)
        lowest = [draw.lowest_layer for draw in self.draws if draw.lowest_layer is not None]
        return Row(
            **identity(self.contestant, self.case),
            rounds=len(self.draws),
            forward_ms=plain.forward * 1e3,
            backward_ms=plain.backward * 1e3,
            optimizer_ms=plain.optimizer * 1e3,
            refresh_ms=refresh * 1e3,
            step_ms=step * 1e3,
            p20_ms=(wholes.p20 + refresh) * 1e3,
            p80_ms=(wholes.p80 + refresh) * 1e3,
            tokens_per_s=self.case.tokens / step,
            clock="process" if self.case.device == "cpu" and torch.get_num_threads() == 1 else "wall",
            wall_ms=statistics.mean(draw.wall for draw in self.draws) * 1e3,
            lowest_layer=statistics.mean(lowest) if switches else None,
            expected_lowest_layer=self.trainee.expected_lowest,
            saved_bytes=statistics.mean(draw.saved_bytes for draw in self.draws),
            state_bytes=max(draw.held_bytes for draw in self.draws) - weights,
            peak_bytes=peak,
        )

    def _peak_steps(self) -> None:
        for _ in range(self.trainee.cycle):
            self._step()


def _is_weight(name: str) -> bool:
    """Whether a parameter of this name is one of the model's own, not an adapter's or a slot."""
    return "lora_" not in name and not name.endswith(".slot")


def identity(contestant: Contestant, case: Case) -> dict[str, Any]:
    """Return the fields of a row that say what was measured."""
    ranks = f"active {case.active_layers}, rank {case.rank}, lora {case.lora_rank}, galore {case.galore_rank}"
    return {
        "device": case.device,
        "dtype": case.dtype,
        "geometry": case.geometry,
        "batch": case.batch,
        "seq_len": case.seq_len,
        "name": contestant.name,
        "method": contestant.title,
        "settings": f"{ranks}, scores {case.scores}",
    }


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Return the rows, each with its time beside those of peft's LoRA and of full fine-tuning, where they have one."""
    by_name = {row.name: row for row in rows}

    def ratio(row: Row, other: str, field: str = "step_ms") -> float | None:
        own, base = (getattr(each, field, None) for each in (row, by_name.get(other)))
        return own / base if own is not None and base is not None else None

    return [
        replace(
            row, ratio_to_peft_lora=ratio(row, LORA), ratio_to_full=ratio(row, FULL),
            wall_ratio_to_peft_lora=ratio(row, LORA, "wall_ms"),
        )
        for row in rows
    ]  # fmt: skip
