"""`lisa-kernels plan`: the memory of a run as text, JSON and picture, or the settings that fit a size."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lisa_kernels.distributed import process_count
from lisa_kernels.errors import InputError
from lisa_kernels.plan.allocator import replay
from lisa_kernels.plan.apart import run_apart
from lisa_kernels.plan.data_rows import DataRows, data_rows
from lisa_kernels.plan.duration import Machine
from lisa_kernels.plan.fit import Fit, proposals
from lisa_kernels.plan.gpu_memory import GpuMemory
from lisa_kernels.plan.host import print_host
from lisa_kernels.plan.moves import moves_of
from lisa_kernels.plan.options import finetune_command, workload_of
from lisa_kernels.plan.plot import plot_timeline, stacked
from lisa_kernels.plan.rehearsal import Workload, rehearse
from lisa_kernels.plan.report import print_fit, print_plan, proposal_dict
from lisa_kernels.plan.result import Plan, allocated_bytes
from lisa_kernels.plan.streaming import print_streamed
from lisa_kernels.plan.times import (
    as_dict,
    check_asked,
    durations,
    is_asked,
    machine_of,
    print_times,
    with_data,
)
from lisa_kernels.plan.trace import CATEGORIES, Trace
from lisa_kernels.plan.travel_report import check_ranks, print_travel, travel_sentences
from lisa_kernels.scores.report import new_figure
from lisa_kernels.sizes import gb, parse_size
from lisa_kernels.train.configs import load_config
from lisa_kernels.train.empty_model import empty_model
from lisa_kernels.train.memory import PlannedMemory
from lisa_kernels.train.models import packed_note
from lisa_kernels.train.options import AUTO, FineTuneOptions
from lisa_kernels.train.prepare import RunData
from lisa_kernels.train.rank_rows import share_of_rank
from lisa_kernels.train.taken import run_steps

# Moments of a rehearsal that a run's page shows.
PAGE_POINTS = 240
# What model and optimizer hold between backward and step.
HELD = ("weights", "gradients", "optimizer state", "bases")


def plan_command(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Make and print the plan that the command line asks for; returns it as plain values."""
    device_bytes = None if arguments.fit is None else parse_size(arguments.fit)
    if arguments.plot is not None:
        new_figure(arguments.plot)
    start = time.perf_counter()
    check_ranks(arguments.ranks, arguments.shard)
    options = _options(arguments)
    if isinstance(options.gradient_checkpointing, str):
        device_bytes = _size_for_recomputation(options.gradient_checkpointing, device_bytes)
    stored = packed_note(options.model, options.dtype)
    if stored is not None:
        console.print(f"note: {stored}", highlight=False, markup=False, soft_wrap=True)
    data = None
    if options.data:
        options, data = with_data(options, empty_model(options.model, options.dtype))
    rows, micro_batches = share_of_rank(options.batch_size, options.accumulate, arguments.ranks)
    of_rank = dataclasses.replace(options, batch_size=rows, accumulate=micro_batches)
    workload = workload_of(of_rank, arguments.ranks, data, arguments.shard)
    workload = dataclasses.replace(workload, mixed_cards=arguments.mixed_cards)
    steps = None if options.epochs is not None else run_steps(options, 0)
    free = options.gradient_checkpointing is None or isinstance(options.gradient_checkpointing, str)
    blocks = int(load_config(options.model).get_text_config().num_hidden_layers) if free else 0
    if is_asked(arguments):
        # A name that is unknown is told before anything takes time.
        check_asked(arguments)
    machine = None if device_bytes is None else machine_of(arguments, device_bytes)
    ranked = _find(workload, device_bytes, console, blocks, steps, machine)
    found = ranked[0]
    with console.status("reckoning the time"):
        times = durations(found.plan, arguments)
    result: dict[str, Any] = {
        **found.plan.as_dict(), **as_dict(times, found.plan, arguments), "seconds": time.perf_counter() - start,
    }  # fmt: skip
    if device_bytes is not None:
        result["fit"] = {
            "bytes": device_bytes, "margin_bytes": found.plan.margin_bytes(device_bytes, found.expandable),
            "expandable_segments": found.expandable, "rehearsals": found.rehearsals,
            "command": finetune_command(found.plan.workload, found.expandable),
            "proposals": [proposal_dict(each, device_bytes, machine) for each in ranked],
        }  # fmt: skip
    if not arguments.json:
        print_plan(found.plan, Console())
        print_host(found.plan.host, Console())
        print_streamed(found.plan.streamed, Console())
        print_travel(found.plan, Console())
        print_times(times, found.plan, arguments, Console())
        if device_bytes is not None:
            print_fit(ranked, device_bytes, machine, Console())
    if arguments.plot is not None:
        plot_timeline(found.plan, arguments.plot, moves_of(found.plan.workload))
        console.print(f"picture in {arguments.plot}")
    return result


def plan_run(
    options: FineTuneOptions, ranks: int = 1, data: RunData | None = None, travels: bool = False
) -> PlannedMemory:  # fmt: skip
    """Return what a run with `options` takes by plan, and what is alive over its steps; of ranks each one's.

    data: what was read for it; without any, or of plain text, every row is one sequence of --seq-len tokens. travels:
    whether to tell what ranks send each other too.
    """
    known = None
    if data is not None and not data.is_text:
        known = data_rows(data, empty_model(options.model, options.dtype))
    if options.shard and process_count() > 1:
        return run_apart(_planned, options, ranks, known, travels)
    return _planned(options, ranks, known, travels)


def _planned(options: FineTuneOptions, ranks: int, data: DataRows | None, travels: bool) -> PlannedMemory:
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    workload = workload_of(options, ranks, data, options.shard)
    trace = rehearse(workload, gpu=GpuMemory.here() if on_gpu else None)
    numbers, rows = stacked(trace, PAGE_POINTS)
    names = [trace.events[number].phase for number in numbers]
    starts = [at for at, name in enumerate(names) if at == 0 or name != names[at - 1]]
    reserve = replay(trace) if on_gpu else None
    return PlannedMemory(
        trace.peak_bytes if reserve is None else allocated_bytes(reserve), trace.live_at(trace.peak_index),
        held_before_steps(trace), dict(zip(CATEGORIES, rows)), [(at, names[at]) for at in starts],
        0 if reserve is None else reserve.reserved, travel_sentences(Plan(workload, trace)) if travels else [],
    )  # fmt: skip


def held_before_steps(trace: Trace) -> dict[str, int]:
    """Return by category the most bytes alive where a backward has ended, and its gradients wait for the step."""
    alive, most = dict.fromkeys(CATEGORIES, 0), dict.fromkeys(CATEGORIES, 0)
    for event, following in zip(trace.events, [*trace.events[1:], None]):
        alive[event.category] += event.bytes
        if event.phase.endswith("backward") and (following is None or following.phase != event.phase):
            most = {name: max(size, alive[name]) for name, size in most.items()}
    return {name: most[name] for name in HELD}


def _options(arguments: argparse.Namespace) -> FineTuneOptions:
    """Return the options of the run that is planned; its output decides nothing, its data how long it is."""
    known = {field.name for field in dataclasses.fields(FineTuneOptions)}
    values = {name: value for name, value in vars(arguments).items() if name in known}
    return FineTuneOptions(**{**values, "data": arguments.data or ""}, output=Path())


def _size_for_recomputation(given: str, device_bytes: int | None) -> int:
    """Return the memory that decides how many blocks are recomputed: a plan asks no device."""
    size = device_bytes if given == AUTO else parse_size(given)
    if size is None:
        raise InputError("--gradient-checkpointing auto needs --fit SIZE here, for a plan asks no device what is free.")
    if device_bytes is not None and size != device_bytes:
        raise InputError(f"--fit and --gradient-checkpointing {given} give two sizes; give one of them.")
    return size


def _find(
    workload: Workload, device_bytes: int | None, console: Console, blocks: int, steps: int | None,
    machine: Machine | None,
) -> list[Fit]:  # fmt: skip
    """Return the plan of the workload, or of all settings that fit and teach the same, fastest first."""
    with console.status("rehearsing") as status:

        def make_plan(asked: Workload) -> Plan:
            plan = Plan(asked, rehearse(asked, gpu=GpuMemory.here()), steps=steps)
            status.update(f"rehearsing (the last: {gb(plan.peak_bytes)})")
            return plan

        def seconds(plan: Plan) -> float:
            status.update("reckoning the time")
            assert machine is not None
            return sum(plan.duration(machine).step)

        if device_bytes is None:
            return [Fit(make_plan(workload), expandable=False, rehearsals=1)]
        return proposals(workload, device_bytes, make_plan, seconds, blocks)
