"""Single linear layers, side by side: trained, frozen, low-rank and with adapters; then one matrix's update.

    lisa-kernels bench lowrank                # or python -m bench.lowrank, from a checkout of the sources
    lisa-kernels bench lowrank --help

Every layer gets an input that wants a gradient, as in the middle of a model. All forms of a layer share one weight.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

from rich.console import Console

from bench import lowrank_layers, lowrank_updates, plots
from bench.command import main_of, parse_device, positive, set_threads
from bench.held_bytes import free_bytes
from bench.lowrank_cases import Case, parse_shapes
from bench.lowrank_layers import LayerRow, RunningLayer
from bench.lowrank_table import print_rows
from bench.lowrank_updates import RunningUpdate, UpdateRow
from bench.optimizer import parse_dtypes
from bench.rows import append_row
from bench.step_contestants import reason_of
from bench.timing import interleave
from lisa_kernels.commands.bench import add_bench_lowrank_options

Named = TypeVar("Named", lowrank_layers.Contestant, lowrank_updates.Contestant)
Running = TypeVar("Running", RunningLayer, RunningUpdate)
# Per weight: the weight, a full gradient with its copy, and the parts of an SVD, in 32 bits.
BYTES_PER_WEIGHT = 40


def lacking_memory(case: Case) -> str | None:
    """Return why the case does not fit into memory, or None."""
    wanted = case.inputs * case.outputs * BYTES_PER_WEIGHT + 16 * case.tokens * (case.inputs + case.outputs) * 4
    free = free_bytes(case.device)
    return None if wanted <= 0.95 * free else f"needs {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} are free"


def _started(reasons: dict[Named, str | None], build: Callable[[Named], Running]) -> dict[Named, Running]:
    """Build those without a reason not to run; a peer that fails gets one."""
    running = {}
    for one in [one for one, reason in reasons.items() if reason is None]:
        try:
            running[one] = build(one)
        except Exception as error:
            if one.package in ("lisa_kernels", "torch"):
                raise
            reasons[one] = reason_of(error)
    return running


def measure_layers(case: Case, rounds: int) -> list[LayerRow]:
    """Run every form of the layer in turns; returns a row for each."""
    weight, shortage = case.weight(), lacking_memory(case)
    reasons = {one: one.unavailable() or shortage for one in lowrank_layers.CONTESTANTS}
    running = _started(reasons, lambda one: RunningLayer(one, case, weight, rounds))
    interleave([one.read_clock for one in running.values()], [one.rounds for one in running.values()])
    rows = [
        running[one].row() if one in running else LayerRow(**lowrank_layers.identity(one, case), reason=reason)
        for one, reason in reasons.items()
    ]
    return lowrank_layers.with_ratios(rows)


def measure_updates(case: Case, rounds: int, limits: bool) -> list[UpdateRow]:
    """Run every update of the matrix in turns; returns a row for each."""
    weight, shortage = case.weight(), lacking_memory(case)
    reasons = {one: one.unavailable(case, limits) or shortage for one in lowrank_updates.CONTESTANTS}
    running = _started(reasons, lambda one: RunningUpdate(one, case, weight, rounds))
    interleave([one.read_clock for one in running.values()], [one.rounds for one in running.values()])
    rows = [
        running[one].row() if one in running else UpdateRow(**lowrank_updates.identity(one, case), reason=reason)
        for one, reason in reasons.items()
    ]
    return lowrank_updates.with_ratios(rows)


def parse_cases(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that were asked for; InputError for one that cannot be."""
    numbers = {name: positive(name.replace("_", "-"), getattr(arguments, name)) for name in NUMBERS}
    device, shapes = parse_device(arguments.device), parse_shapes(arguments.shapes)
    cases = [Case(device, dtype, *shape, **numbers) for dtype in parse_dtypes(arguments.dtype) for shape in shapes]
    for case in cases:
        case.check()
    return cases


NUMBERS = ("tokens", "rank", "lora_rank", "gap")


def run(arguments: argparse.Namespace, console: Console) -> list[LayerRow | UpdateRow]:
    """Check what was asked for, measure every case and show it; returns the rows."""
    cases, rounds = parse_cases(arguments), positive("rounds", arguments.rounds)
    if arguments.plot is not None:
        plots.check_picture(arguments.plot)
    set_threads(arguments.threads)
    rows: list[LayerRow | UpdateRow] = []
    for case in cases:
        console.print(f"{case.shape}, {case.tokens} tokens, {case.dtype} on {case.device}", highlight=False)
        layers, updates = measure_layers(case, rounds), measure_updates(case, rounds, not arguments.no_limits)
        if not arguments.json:
            print_rows(layers, updates)
        found: list[LayerRow | UpdateRow] = [*layers, *updates]
        rows += found
        if arguments.record:
            for row in found:
                append_row("lowrank", {**asdict(row), "ran_on": row.device})
    if arguments.plot is not None:
        plots.plot_layers([asdict(row) for row in rows if isinstance(row, LayerRow)], arguments.plot)
        console.print(f"picture in {arguments.plot}")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, or 2 for a mistake in what was given."""
    return main_of("lowrank", "Time single linear layers.", add_bench_lowrank_options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
