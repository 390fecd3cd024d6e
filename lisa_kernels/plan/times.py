"""The time of a planned run as text and JSON: on the machine that is asked for, or on every card that holds the run."""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
from typing import Any

from rich.console import Console
from rich.table import Table

from lisa_kernels.errors import InputError
from lisa_kernels.plan.cards import card_bytes
from lisa_kernels.plan.data_rows import DataRows, data_rows
from lisa_kernels.plan.duration import Duration, Machine
from lisa_kernels.plan.machines import CARDS, Seconds, card_by_name
from lisa_kernels.plan.result import Plan
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.prepare import read_data
from lisa_kernels.train.taken import run_steps

UNCONFIRMED = "predicted from data sheets; no card has confirmed it"
MINUTE, HOUR, DAY = 60, 3600, 86400
# A size given in GB is a little less, or more, than what is sold by that number.
SAME_SIZE = 0.9


def is_asked(arguments: argparse.Namespace) -> bool:
    """Return whether one machine is asked for."""
    return any(value is not None for value in (arguments.card, arguments.bandwidth, arguments.tflops))


def _is_this_cpu(arguments: argparse.Namespace) -> bool:
    return arguments.card is not None and arguments.card.lower() == "cpu"


def check_asked(arguments: argparse.Namespace) -> None:
    """Raise InputError where what is asked for is no machine."""
    if not _is_this_cpu(arguments):
        card_by_name(arguments.card, arguments.bandwidth, arguments.tflops)
    elif arguments.bandwidth is not None or arguments.tflops is not None:
        raise InputError(
            "--card cpu is measured, and --bandwidth and --tflops describe a card: leave them out, or the cpu."
        )


def durations(plan: Plan, arguments: argparse.Namespace) -> list[Duration]:
    """Return what a step takes on the machine asked for, or else on each known card that holds the run."""
    if is_asked(arguments):
        if _is_this_cpu(arguments):
            from lisa_kernels.plan.this_cpu import ThisCpu

            return [plan.duration(ThisCpu())]
        return [plan.duration(card_by_name(arguments.card, arguments.bandwidth, arguments.tflops))]
    return [plan.duration(card) for card in CARDS.values() if plan.fits(card_bytes(card.memory_gb), expandable=True)]


def machine_of(arguments: argparse.Namespace, device_bytes: int) -> Machine:
    """Return the machine by whose times settings are ranked: the one asked for, or the smallest card of that size."""
    if _is_this_cpu(arguments):
        from lisa_kernels.plan.this_cpu import ThisCpu

        return ThisCpu()
    if is_asked(arguments):
        return card_by_name(arguments.card, arguments.bandwidth, arguments.tflops)
    sizes = sorted(CARDS.values(), key=lambda card: card.memory_gb)
    return next((card for card in sizes if card_bytes(card.memory_gb) >= SAME_SIZE * device_bytes), sizes[-1])


def with_data(options: FineTuneOptions, model: Any) -> tuple[FineTuneOptions, DataRows | None]:
    """Return (the options with the steps of their passes over the data, their rows of examples; None for plain text).

    The data are read for it.
    """
    data = read_data(options, Console(file=io.StringIO()))
    if options.epochs is not None:
        rows = len(data_rows(data, model).rows)
        options = dataclasses.replace(options, steps=run_steps(options, rows), epochs=None)
    return options, None if data.is_text else data_rows(data, model)


def as_dict(found: list[Duration], plan: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the prediction as plain values: of one machine that was asked for by name, of several as a list."""
    steps, values = plan.steps, list[dict[str, Any]]()
    for duration in found:
        whole = None if steps is None else duration.step.times(steps)
        values.append(
            {
                **duration.as_dict(),
                "run_seconds_low": None if whole is None else whole.low,
                "run_seconds_high": None if whole is None else whole.high,
            }
        )
    return {"steps": steps, **(values[0] if is_asked(arguments) else {"times": values})}


def print_times(found: list[Duration], plan: Plan, arguments: argparse.Namespace, console: Console) -> None:
    """Print a sentence for one machine, or a table for several."""
    if is_asked(arguments):
        for line in sentences(found[0], plan.steps):
            console.print(line, highlight=False, soft_wrap=True)
        return
    if not found:
        return
    whole = "the run" if plan.steps is None else f"{plan.steps:,} steps"
    table = Table("card", "a step", "tokens/s", whole, "bound by", box=None)
    for duration in found:
        step = duration.step
        table.add_row(
            duration.machine, span(step), f"{duration.tokens / step.high:,.0f}-{duration.tokens / step.low:,.0f}",
            "?" if plan.steps is None else span(step.times(plan.steps)), duration.bound_by,
        )  # fmt: skip
    console.print(table)
    console.print(f"Times are {UNCONFIRMED}; --card NAME says where they go.", highlight=False, soft_wrap=True)


def sentences(duration: Duration, steps: int | None) -> list[str]:
    """Return what one machine takes: a step and the run, where the time goes, and what bounds it."""
    step, whole = duration.step, sum(duration.step)
    run = "" if steps is None else f", {span(step.times(steps))} for {steps:,} steps"
    parts = ", ".join(f"{name} {sum(seconds) / whole:.0%}" for name, seconds in duration.parts.items())
    bounds = ", ".join(f"{name} {share:.0%}" for name, share in sorted(duration.bounds.items(), key=lambda b: -b[1]))
    basis = "by its own speed, measured just now" if duration.machine == "this CPU" else UNCONFIRMED
    return [
        f"{span(step)} a step on {duration.machine}, {duration.tokens / step.high:,.0f} to "
        f"{duration.tokens / step.low:,.0f} tokens/s{run} ({basis})",
        f"{parts}; bound by: {bounds}; {duration.launches:,} launches a step",
    ]  # fmt: skip


def span(seconds: Seconds) -> str:
    """Return a range of time in one unit: 0.31-0.39 s, 12-15 min, 5.3-6.7 h."""
    for unit, size in (("days", 2 * DAY), ("h", 2 * HOUR), ("min", 2 * MINUTE), ("s", 1.0)):
        if seconds.high >= size or unit == "s":
            scale = {"days": DAY, "h": HOUR, "min": MINUTE, "s": 1}[unit]
            low, high = seconds.low / scale, seconds.high / scale
            digits = max(0, 2 - math.ceil(math.log10(high))) if high > 0 else 2
            return f"{low:.{digits}f}-{high:.{digits}f} {unit}"
    raise AssertionError("every time is at least in seconds")
