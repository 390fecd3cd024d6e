"""Whole training steps, side by side: our methods, full fine-tuning, and other people's LoRA, GaLore and BAdam.

    lisa-kernels bench step                # or python -m bench.step, from a checkout of the sources
    lisa-kernels bench step --help
    lisa-kernels bench step --model preset:llama-2-7b --device cuda    # any model, beside its plan: `model_step.py`

Forward, backward and optimizer are timed apart, in one process and in turns. All contestants train the same weights:
each has modules, gradients and state of its own. Methods that switch layers are averaged over draws of their own
sampler, because a backward ends at the lowest layer that trains; a first step with its new bases and a last one with
its switch are timed apart and spread over the steps that lie between them in true training.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from bench import plots
from bench.command import main_of, parse_device, positive, set_threads
from bench.held_bytes import free_bytes, held_bytes
from bench.peers import DTYPES
from bench.rows import append_row
from bench.step_cases import SCORES, Case
from bench.step_contestants import Contestant, Trainee, parse_methods, reason_of, start
from bench.step_runs import Row, Running, identity, with_ratios
from bench.step_table import print_rows
from bench.timing import interleave
from lisa_kernels.commands.bench import add_bench_step_options
from lisa_kernels.errors import InputError, unknown_name

# What autograd keeps of one layer, in its widths: norms, projections, rotations, attention, gate, up and product.
ACTIVATIONS = 16


def lacking_memory(case: Case, model: Any, contestants: Sequence[Contestant]) -> str | None:
    """Return why the contestants do not fit into memory side by side, or None; an estimate."""
    weights = held_bytes(model.parameters())
    kept = sum(contestant.kept_share for contestant in contestants) * weights * 4 / DTYPES[case.dtype].itemsize
    widths = case.layers * (ACTIVATIONS * case.width + 5 * case.intermediate) + 3 * case.vocabulary
    wanted = weights + kept + case.tokens * widths * 4
    free = free_bytes(case.device)
    if wanted <= 0.95 * free:
        return None
    return f"all need about {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} are free: fewer --methods, a smaller model"


def _started(contestant: Contestant, case: Case, trainee: Trainee, batch: Any) -> Running | str:
    """Take the first steps; returns the reason where a peer fails in them."""
    try:
        return Running(contestant, case, trainee, batch)
    except Exception as error:
        if not contestant.is_peer:
            raise
        return reason_of(error)


def measure(case: Case, contestants: Sequence[Contestant], rounds: int, console: Console) -> list[Row]:
    """Run the contestants of one case in turns; returns a row for each, in order."""
    # badam prints what it trains, on the standard output that belongs to the result.
    with contextlib.redirect_stdout(io.StringIO()):
        return _measure(case, contestants, rounds, console)


def _measure(case: Case, contestants: Sequence[Contestant], rounds: int, console: Console) -> list[Row]:
    model, batch = case.model(), case.tokens_and_labels()
    reasons = {contestant: contestant.unavailable() for contestant in contestants}
    if shortage := lacking_memory(case, model, [one for one, reason in reasons.items() if reason is None]):
        reasons = {contestant: reason or shortage for contestant, reason in reasons.items()}
    running: dict[Contestant, Running] = {}
    for contestant, reason in reasons.items():
        if reason is None:
            console.print(f"  warming up {contestant.name}", highlight=False)
            trainee = start(contestant, case, model, rounds)
            begun = trainee if isinstance(trainee, str) else _started(contestant, case, trainee, batch)
            if isinstance(begun, str):
                reasons[contestant] = begun
            else:
                running[contestant] = begun
    interleave([one.read_clock for one in running.values()], [rounds] * len(running))
    console.print("  measuring the peaks of memory", highlight=False)
    rows = [
        running[contestant].row() if contestant in running else Row(**identity(contestant, case), reason=reason)
        for contestant, reason in reasons.items()
    ]
    return with_ratios(rows)


def parse_case(arguments: argparse.Namespace) -> Case:
    """Return the case that was asked for; InputError for one that cannot be."""
    if arguments.dtype is not None and arguments.dtype not in DTYPES:
        raise unknown_name("dtype", arguments.dtype, DTYPES)
    if arguments.scores not in SCORES:
        raise unknown_name("kind of scores", arguments.scores, SCORES)
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Case)}
    said = {name: value for name, value in given.items() if value is not None}
    case = Case(**{**said, "device": parse_device(arguments.device)})
    case.check()
    return case


def run(arguments: argparse.Namespace, console: Console) -> Sequence[Any]:
    """Check what was asked for, measure it and show it; returns the rows."""
    _check_transformers()
    if arguments.model is not None:
        from bench import model_step

        return model_step.run(arguments, console)
    case, contestants = parse_case(arguments), parse_methods(arguments.methods)
    rounds = positive("rounds", arguments.rounds)
    if arguments.plot is not None:
        plots.check_picture(arguments.plot)
    set_threads(arguments.threads)
    console.print(f"{case.geometry}, {case.batch} × {case.seq_len} tokens on {case.device}", highlight=False)
    rows = measure(case, contestants, rounds, console)
    if not arguments.json:
        print_rows(rows)
    if arguments.record:
        for row in rows:
            append_row("step", {**asdict(row), "ran_on": row.device})
    if arguments.plot is not None:
        plots.plot_parts([asdict(row) for row in rows], arguments.plot)
        console.print(f"picture in {arguments.plot}")
    return rows


def _check_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise InputError("bench step needs transformers: pip install 'lisa_kernels[train]'.") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, or 2 for a mistake in what was given."""
    return main_of("step", "Time whole training steps.", add_bench_step_options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
