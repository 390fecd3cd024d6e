"""What a step of each contestant of `bench.pretrained` costs: operations, peak bytes, and CPU time beside peft LoRA's.

Operations (a multiplication with its addition counts as two) and bytes are counted in real steps on real weights, so
they are the same on any machine. Times are those of an idle one: two models take turns in one process, and the middle
of the ratios is kept. `bench.pretrained_table` joins them with the curves.

    python -m bench.pretrained_cost --data FOLDER                # every contestant that has no row
    python -m bench.pretrained_cost --data FOLDER --only LoRA --rounds 8
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.pretrained import train_step
from bench.pretrained_contestants import CONTESTANTS, Contestant
from bench.pretrained_table import BEFORE, PEER
from bench.pretrained_tasks import BASE, Size, Task, read_task
from bench.rows import append_row, read_rows
from lisa_kernels.plan.tracker import StorageTracker
from lisa_kernels.plan.work import WorkLog
from lisa_kernels.train.models import load_model

ROWS = "pretrained_cost"
LR, SEED = 1e-4, 0
# The first steps choose bases and make state; counted are those after them.
FIRST_STEPS, COUNTED_STEPS, COUNTED = 2, 2, "counted"
Batches = Iterator[dict[str, Tensor]]


class Trainee:
    """One contestant on its own copy of the base, a step at a time."""

    def __init__(self, contestant: Contestant, task: Task, base: str, checkpointing: bool = False) -> None:
        self.model: Any = load_model(base, torch.float32, 0)
        self.model.config.use_cache = False
        if checkpointing:
            self.model.gradient_checkpointing_enable()
            # Without it the first of peft's adapters would see an input that needs no gradient.
            self.model.enable_input_require_grads()
        self._batches: Batches = task.batches(SEED)
        calibration = [batch for batch, _ in zip(task.batches(SEED), range(4))]
        self._optimizer = contestant.start(self.model, LR, SEED, calibration)

    def step(self) -> float:
        """Train on one more row; returns CPU seconds."""
        begin = time.process_time()
        train_step(self.model.train(), self._optimizer, next(self._batches))
        return time.process_time() - begin


def peak_over_weights(contestant: Contestant, task: Task, base: str = BASE, checkpointing: bool = False) -> int:
    """Return the most bytes over the base's weights of the first steps."""
    weights = sum(param.numel() * param.element_size() for param in load_model(base, torch.float32, 0).parameters())
    held = StorageTracker("cpu")
    with held:
        trainee = Trainee(contestant, task, base, checkpointing)
        held.recording = True
        held.label(_held_by(trainee.model), "weights")
        for _ in range(FIRST_STEPS):
            trainee.step()
    return held.trace().peak_bytes - int(weights)


def counted(contestant: Contestant, task: Task, base: str = BASE) -> dict[str, int]:
    """Return operations and peak bytes over the base's weights of a step, means and most of some in a row."""
    peaks = [peak_over_weights(contestant, task, base, checkpointing) for checkpointing in (False, True)]
    trainee = Trainee(contestant, task, base)
    for _ in range(FIRST_STEPS):
        trainee.step()
    # Apart from the peak, for a log of operations keeps tensors.
    work = WorkLog()
    tracker = StorageTracker("cpu", watch=work)
    with tracker, tracker.phase(COUNTED):
        tracker.recording = True
        for _ in range(COUNTED_STEPS):
            trainee.step()
    products = 0
    for counts in work.of_phases(lambda phase: phase == COUNTED).values():
        for key, count in counts.items():
            operation = work.operations[key]
            products += 0 if operation is None else operation.products * count
    return {
        "operations": products // COUNTED_STEPS, "peak_bytes_over_weights": peaks[0],
        "peak_bytes_over_weights_checkpointed": peaks[1],
    }  # fmt: skip


def _held_by(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def timed(contestant: Contestant, peer: Contestant, task: Task, rounds: int, base: str = BASE) -> float:
    """Return the middle of CPU time over the peer's, two models in turns on the same rows."""
    pair = [Trainee(each, task, base) for each in (contestant, peer)]
    for trainee in pair:
        for _ in range(FIRST_STEPS):
            trainee.step()
    ratios = []
    for number in range(rounds):
        order = (0, 1) if number % 2 else (1, 0)
        seconds = {place: pair[place].step() for place in order}
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def main() -> None:
    """Measure those that have no row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' files")
    parser.add_argument("--only", action="append", help="only contestants of this name")
    parser.add_argument("--rounds", type=int, default=6, help="steps of each of the two (default: %(default)s)")
    given = parser.parse_args()
    task, known = read_task("gsm8k", given.data, Size(test_rows=1)), {row["contestant"] for row in read_rows(ROWS)}
    peer = next(contestant for contestant in CONTESTANTS if contestant.name == PEER)
    for contestant in CONTESTANTS:
        if contestant.name == BEFORE or contestant.name in known or (given.only and contestant.name not in given.only):
            continue
        row = {"contestant": contestant.name, **counted(contestant, task)}
        row["cpu_time_over_peer"] = timed(contestant, peer, task, given.rounds)
        row["rounds"] = given.rounds
        append_row(ROWS, row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
