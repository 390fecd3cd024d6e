"""Layers as experts for a part of the flow, beside dense models of as many layers, on digits or garments.

Every arm is trained twice over: for as many steps as the dense model of all layers, and for as many layer passes; one
run goes through the first budget to the second, at one learning rate, and the averages of its weights are judged at
both. Three seeds; rows that exist are not run again.

    python -m bench.flow            # runs what is missing, then prints the table and writes it into bench/README.md
    python -m bench.flow --seeds 1  # the first seed only
    python -m bench.flow --report   # only the tables
    python -m bench.flow --data fashion-mnist --groups 3   # Fashion-MNIST, 28 × 28, from Debian's package or :FOLDER
    python -m bench.flow --plot bench/results/flow.png   # samples of seed 0 under equal layer passes, trained again
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.flow_arms import ARMS, Arm, Size, arms_of
from bench.flow_measures import (
    PASSES,
    TIMED_BATCHES,
    Judge,
    Pictures,
    layers_per_evaluation,
    load_pictures,
    milliseconds_per_image,
    quality,
    real_quality,
    samples,
    training_bytes,
)
from bench.flow_table import FILES, REAL, report
from bench.plots import check_picture, plot_digits
from bench.rows import append_row, read_rows
from lisa_kernels import attach
from lisa_kernels.flow import ExpertsAdamW
from lisa_kernels.flow.average import AveragedGroups
from lisa_kernels.flow.begin import copy_groups
from lisa_kernels.flow.path import flow_loss
from lisa_kernels.flow.transformer import FlowTransformer

SEEDS = (0, 1, 2)
SIZES = {"digits": Size(), "fashion-mnist": Size(side=28, patch=4, dense_steps=600)}
# Of which samples are drawn.
SHOWN = ("A dense, 12 layers", "B dense, 4 layers", "C 3 groups", "F 3 groups, each on all t")


def start(
    arm: Arm, size: Size, seed: int, retired_state: str = "keep", source: FlowTransformer | None = None
) -> tuple[FlowTransformer, ExpertsAdamW]:
    """Return an arm's model, its weights random by the seed or those of `source`, and its optimizer."""
    torch.manual_seed(seed)
    model = arm.model(size)
    if source is not None:
        copy_groups(model, source)
    optimizer = attach(model, arm.method(retired_state), lr=size.lr, seed=seed)
    assert isinstance(optimizer, ExpertsAdamW)
    return model, optimizer


def batches(train: Pictures, size: Size, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (pixels, labels, noise), the same for all arms of a seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(train.pixels), (size.batch,), generator=generator)
        noise = torch.randn(size.batch, *train.pixels.shape[1:], generator=generator)
        yield train.pixels[rows], train.labels[rows], noise


Trained = tuple[FlowTransformer, int, list[str], float]


def trained(arm: Arm, size: Size, seed: int, train: Pictures) -> Iterator[Trained]:
    """Train an arm; yields (averaged model, steps, budgets that end here, CPU seconds of training) at each end."""
    budgets, rows = arm.budgets(size.dense_steps), batches(train, size, seed)
    source, first, seconds = None, 0, 0.0
    if arm.copied_after:
        first = round(arm.copied_after * max(budgets.values()))
        *_, (source, _, _, seconds) = _trained(arm.dense(), size, seed, rows, {"copied": first})
    for model, steps, ended, more in _trained(arm, size, seed, rows, budgets, source, first):
        yield model, steps, ended, seconds + more


def _trained(
    arm: Arm, size: Size, seed: int, rows: Iterator[tuple[Tensor, Tensor, Tensor]], budgets: dict[str, int],
    source: FlowTransformer | None = None, taken: int = 0,
) -> Iterator[Trained]:  # fmt: skip
    """Go on after `taken` steps, with the weights of `source` where it is given, to the ends of all budgets."""
    model, optimizer = start(arm, size, seed, source=source)
    judged, seconds = model.like(), 0.0
    judged.load_state_dict(model.state_dict())
    average = AveragedGroups(judged, judged.route, size.decay)
    model.train()
    for step, (pixels, labels, noise) in enumerate(rows, taken + 1):
        begin = time.process_time()
        group = optimizer.active_group
        flow_loss(model, pixels, optimizer.times(size.batch), labels, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.process_time() - begin
        average.update(model, group)
        ended = [name for name, steps in budgets.items() if steps == step]
        if ended:
            average.copy_into(judged)
            yield judged, step, ended, seconds
        if step == max(budgets.values()):
            return


def run(arm: Arm, size: Size, seed: int, train: Pictures, held_out: Pictures, judge: Judge) -> Iterator[dict[str, Any]]:
    """Train an arm and yield a row at the end of each budget."""
    for model, steps, budgets, seconds in trained(arm, size, seed, train):
        yield {
            "arm": arm.name, "seed": seed, "budgets": budgets, "steps": steps, "layer_passes": steps * arm.layers_run,
            "training_cpu_seconds": round(seconds, 2), **quality(model, train, held_out, judge),
        }  # fmt: skip


def cost(arm: Arm, size: Size, train: Pictures) -> dict[str, Any]:
    """Return what an arm's training holds on the device and what sampling takes; weights are random."""
    model, optimizer = start(arm, size, 0, retired_state="page")
    pixels, labels, noise = next(batches(train, size, 0))
    model.train()

    def loss() -> Tensor:
        return flow_loss(model, pixels, optimizer.times(size.batch), labels, noise)

    for _ in range(arm.groups):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    held = training_bytes(model, optimizer, loss)
    optimizer.detach()
    times = {f"ms_per_image_batch_{batch}": milliseconds_per_image(model, batch) for batch in TIMED_BATCHES}
    return {
        "arm": arm.name, "cost": True, "layers_per_evaluation": layers_per_evaluation(model, labels), **held, **times,
        "parameters": sum(param.numel() for param in model.parameters()),
    }  # fmt: skip


def measure(size: Size, seeds: tuple[int, ...], data: str = "digits", arms: Sequence[Arm] | None = None) -> None:
    """Run what is missing, a seed of all arms after the other."""
    name, arms = data.partition(":")[0], ARMS if arms is None else arms
    file, (train, held_out) = FILES[name], load_pictures(data)
    judge = Judge(train, PASSES[name])

    def missing(**wanted: Any) -> bool:
        wanted = {**size.key(), **wanted}
        return not any(all(row.get(name) == value for name, value in wanted.items()) for row in read_rows(file))

    def add(row: dict[str, Any]) -> None:
        append_row(file, {**size.key(), **row})
        print({name: row.get(name) for name in ("arm", "seed", "budgets", "loss", "accuracy", "frechet")}, flush=True)

    if missing(arm=REAL[name]):
        add({"arm": REAL[name], **real_quality(train, held_out, judge)})
    for arm in arms:
        if missing(arm=arm.name, cost=True):
            add(cost(arm, size, train))
    for seed in seeds:
        for arm in arms:
            # What a kill left half done is run from its start; its first row stands.
            if missing(arm=arm.name, seed=seed, layer_passes=arm.budgets(size.dense_steps)["passes"] * arm.layers_run):
                for row in run(arm, size, seed, train, held_out, judge):
                    if missing(arm=arm.name, seed=seed, steps=row["steps"]):
                        add(row)


def plot(size: Size, path: Path) -> None:
    """Draw a row of samples for each of some arms, two of each class, and of real digits."""
    train, _ = load_pictures("digits")
    rows = {}
    for arm in ARMS:
        if arm.name in SHOWN:
            *_, (model, _, _, _) = trained(arm, size, SEEDS[0], train)
            images, labels = samples(model.eval())
            rows[arm.name] = images[torch.argsort(labels, stable=True)].unflatten(0, (10, -1))[:, :2].flatten(0, 1)
    rows[REAL["digits"]] = torch.cat([train.pixels[train.labels == label][:2] for label in range(10)])
    plot_digits({name: images[:, 0] for name, images in rows.items()}, path)


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only print the table from the rows that exist")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds")
    parser.add_argument("--data", default="digits", help="digits (default) or fashion-mnist[:FOLDER]")
    parser.add_argument("--groups", type=int, action="append", help="arms of so many groups, and their dense models")
    parser.add_argument("--arm", action="append", metavar="LETTER", help="of these only those that begin so, as B")
    parser.add_argument("--steps", type=int, help="steps of the dense model of all layers")
    parser.add_argument("--plot", type=Path, help="draw samples of some arms, and do nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = arguments.data.partition(":")[0]
    if name not in SIZES:
        parser.error(f"--data {arguments.data}: one of {', '.join(SIZES)} is wanted")
    size = SIZES[name] if arguments.steps is None else replace(SIZES[name], dense_steps=arguments.steps)
    if arguments.plot is not None:
        check_picture(arguments.plot)
        plot(size, arguments.plot)
        return
    if not arguments.report:
        arms = (
            ARMS
            if arguments.groups is None
            else [ARMS[0], *(arm for many in arguments.groups for arm in arms_of(many))]
        )
        wanted = [arm for arm in arms if arguments.arm is None or arm.name[0] in arguments.arm]
        measure(size, SEEDS[: arguments.seeds], arguments.data, wanted)
    report()


if __name__ == "__main__":
    main()
