"""How well each method fine-tunes a real pretrained model at equal tokens, and what that costs.

SmolLM2-135M-Instruct learns a task of `bench.pretrained_tasks`, a packed row a step; held-out answers are asked before,
after, and some of them on the way. The learning rate of each method is the best of its own grid on a seed that is not
counted among the others. Each run is a row; rows that exist are not run again, so that a table may grow over many
evenings.

    python -m bench.pretrained --data FOLDER                         # every method, task gsm8k
    python -m bench.pretrained --data FOLDER --only LoRA --rate 2e-3 --seed 1   # these alone; processes share the rows
    python -m bench.pretrained --report                              # only the table, also into bench/README.md
"""

from __future__ import annotations

import argparse
import functools
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.choice_table import README, choice_table
from bench.pretrained_contestants import CONTESTANTS, Contestant
from bench.pretrained_table import GRID_SEED, report
from bench.pretrained_tasks import BASE, Size, Task, read_task
from bench.readme import put
from bench.rows import append_row, read_rows
from lisa_kernels.layers import RestingLinear
from lisa_kernels.methods import SampledAdamW
from lisa_kernels.train.models import load_model

ROWS = "pretrained"
SEEDS = (0, 1, 2)
WARM_UP = 0.05


def rate_factor(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: up in 5 % of the steps, then down by half a cosine."""
    warm = max(1, round(steps * WARM_UP))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def run(
    contestant: Contestant, lr: float, seed: int, task: Task, size: Size, base: str = BASE
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune the base once; returns the row."""
    model = load_model(base, torch.float32, 0)
    model.config.use_cache = False
    calibration = [batch for batch, _ in zip(task.batches(seed), range(16))]
    optimizer = contestant.start(model, lr, seed, calibration)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, size.steps))
    batches, cpu, wall, curve, taught = task.batches(seed), 0.0, 0.0, [], 0
    average = _Average(model, min(contestant.averaged_steps, size.steps))
    for step in range(size.steps if lr else 0):
        batch = next(batches)
        taught = zlib.crc32(batch["input_ids"].numpy().tobytes(), taught)
        begin = time.process_time(), time.perf_counter()
        train_step(model.train(), optimizer, batch)
        schedule.step()
        cpu, wall = cpu + time.process_time() - begin[0], wall + time.perf_counter() - begin[1]
        done = step + 1
        if size.steps - done < contestant.averaged_steps:
            average.add()
        if size.curve_every and done % size.curve_every == 0 and done < size.steps:
            curve.append([done, round(cpu, 2), round(task.answer_loss(model, size.curve_rows)[0], 5)])
    average.take()
    rests = isinstance(optimizer, SampledAdamW) and any(isinstance(module, RestingLinear) for module in model.modules())
    if rests and not contestant.in_place:
        optimizer.detach()  # type: ignore[attr-defined]
    outcome = task.outcome(model)
    if curve:
        curve.append([size.steps, round(cpu, 2), round(task.loss_of_some(outcome["nats"], size.curve_rows), 5)])
    return {
        "task": task.name, "contestant": contestant.name, "lr": lr, "seed": seed, **size.key(),
        **outcome, "curve": curve, "cpu_seconds": cpu, "wall_seconds": wall, "taught_crc32": taught,
    }  # fmt: skip


class _Average:
    """The mean of a model's parameters after some steps."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self._steps = steps
        self._params: list[Tensor] = list(model.parameters())
        self._sums = [torch.zeros_like(param) for param in self._params] if steps else []

    @torch.no_grad()
    def add(self) -> None:
        torch._foreach_add_(self._sums, self._params, alpha=1 / self._steps)

    @torch.no_grad()
    def take(self) -> None:
        """Make them the model's, where there are any."""
        for param, mean in zip(self._params, self._sums):
            param.copy_(mean)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def measure(
    contestant: Contestant, rates: tuple[float, ...], seeds: tuple[int, ...], task: Callable[[], Task], size: Size,
    name: str,
) -> None:  # fmt: skip
    """Run what is missing of one contestant."""
    for seed in seeds:
        for lr in rates:
            if find_row(name, contestant.name, lr, seed, size) is None:
                row = run(contestant, lr, seed, task(), size)
                append_row(ROWS, row)
                print(
                    f"{contestant.name}: lr {lr:g}, seed {seed}: {row['answer_loss']:.4f}, known "
                    f"{row['known_loss']:.4f} ({row['cpu_seconds']:.0f} CPU s) {row['curve']}",
                    flush=True,
                )


def find_row(task: str, contestant: str, lr: float, seed: int, size: Size) -> dict[str, Any] | None:
    """Return the row of one run, or None."""
    wanted = {"task": task, "contestant": contestant, "seed": seed, **size.key()}
    for row in read_rows(ROWS):
        if all(row[key] == value for key, value in wanted.items()) and abs(row["lr"] - lr) <= 1e-6 * lr:
            return row
    return None


def tuned_rates(contestant: Contestant, task: str, size: Size) -> tuple[float, ...]:
    """Return the rate that was best on the grid's seed, once each of the contestant's own was run; else none."""
    rows = [find_row(task, contestant.name, lr, GRID_SEED, size) for lr in contestant.rates]
    found = [row for row in rows if row is not None]
    return (min(found, key=lambda row: row["answer_loss"])["lr"],) if len(found) == len(rows) else ()


def _means(given: str, name: str) -> bool:
    """Return whether a name was given: itself, or a part of it that is no contestant's whole name."""
    return given == name if any(given == contestant.name for contestant in CONTESTANTS) else given in name


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the tasks' files, see bench.pretrained_tasks")
    parser.add_argument("--task", default="gsm8k", choices=["gsm8k", "commonsense", "alpaca"])
    parser.add_argument("--only", action="append", help="only contestants whose name holds this")
    parser.add_argument("--rate", action="append", type=float, help="learning rates in place of the contestant's own")
    parser.add_argument("--seed", action="append", type=int, help="seeds in place of a grid and then 0, 1 and 2")
    parser.add_argument("--steps", type=int, default=Size.steps, help="steps of a run (default: %(default)s)")
    parser.add_argument("--curve-every", type=int, default=Size.curve_every, help="steps between looks at the loss")
    parser.add_argument("--test-rows", type=int, default=Size.test_rows, help="rows asked (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="only print the table from the rows that exist")
    given = parser.parse_args()
    size = Size(steps=given.steps, test_rows=given.test_rows, curve_every=given.curve_every)
    if not given.report and given.data is None:
        parser.error("--data is missing: the folder with the tasks' files")
    task = functools.cache(lambda: read_task(given.task, given.data, size))
    for contestant in () if given.report else CONTESTANTS:
        if given.only and not any(_means(part, contestant.name) for part in given.only):
            continue
        rates = tuple(given.rate or contestant.rates)
        if given.seed:
            measure(contestant, rates, tuple(given.seed), task, size, given.task)
            continue
        measure(contestant, rates, (GRID_SEED,), task, size, given.task)
        measure(contestant, given.rate or tuned_rates(contestant, given.task, size), SEEDS, task, size, given.task)
    report(given.task, [contestant.name for contestant in CONTESTANTS], SEEDS, size)
    put("choice", choice_table(), README)


if __name__ == "__main__":
    main()
