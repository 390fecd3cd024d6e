"""The steps of a given model on a device, part by part, each beside its plan: `lisa-kernels bench step --model …`.

    lisa-kernels bench step --model preset:llama-2-7b --device cuda    # under ten minutes; rows in runs/, to be sent
    lisa-kernels bench step --model preset:tiny --device cpu

One way to train after the other, on the same weights, which are random: values change no time. Of each: seconds of
forward, recomputation, backward and optimizer, what a switch of layers adds, launches, waits and requests for memory
of a steady step, the peak of memory, and what `plan` says of it, by the card's data sheet and by rates measured here.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from rich.console import Console
from torch import Tensor

from bench import plots
from bench.command import parse_device, positive, set_threads
from bench.device_rates import known_card, measure_rates, seen_by_profiler
from bench.held_bytes import held_bytes
from bench.memory_runs import random_batch, real_model
from bench.model_step_entries import LORA, Entry, parse_entries
from bench.model_step_table import print_rows
from bench.rows import append_row, environment
from bench.step_cases import Case, on_the_same_weights
from bench.step_clock import PARTS, PartsClock
from bench.step_contestants import reason_of
from bench.timing import read_clock, spread
from lisa_kernels import FullFineTune
from lisa_kernels.errors import InputError
from lisa_kernels.info import NAMES, describe
from lisa_kernels.ops.capability import check_dtype
from lisa_kernels.plan.duration import Machine, predict
from lisa_kernels.plan.gpu_memory import GpuMemory
from lisa_kernels.plan.rehearsal import Workload
from lisa_kernels.plan.result import Plan
from lisa_kernels.plan.work import WorkLog
from lisa_kernels.sizes import gb, parse_size
from lisa_kernels.train.configs import load_config
from lisa_kernels.train.models import parse_dtype
from lisa_kernels.train.options import AUTO
from lisa_kernels.train.recomputation import CHECKPOINTING_FROM, fewest_blocks

ROOT = Path(__file__).parents[1]
ROWS = "model_step"
# The first makes state and bases, the second ends with a switch, the third finds the bases of other layers.
WARM_UP = 3
LEAST_ROUNDS = 2


@dataclass(frozen=True)
class ModelRow:
    """One way to train: what was planned, what was measured, or the reason why it was not.

    *_ms are medians over steps of a period, *_low and *_high their 20th and 80th percentiles; switch_ms: what a switch
    of layers and the step after it take more. host_ms: until the host had handed the step over. launches, copies,
    waits, allocations: of one such step, by the profiler, None where it sees no device. operations: dispatched in the
    real steps and planned for them. Bytes are the device's; peak_bytes of a CPU counts tensors. predicted: by machine.
    """

    model: str
    device: str
    dtype: str
    batch: int
    seq_len: int
    recomputed_blocks: int
    name: str
    method: str
    reason: str | None = None
    rounds: int = 0
    forward_ms: float | None = None
    recomputation_ms: float | None = None
    backward_ms: float | None = None
    optimizer_ms: float | None = None
    switch_ms: float | None = None
    step_ms: float | None = None
    step_ms_low: float | None = None
    step_ms_high: float | None = None
    host_ms: float | None = None
    tokens_per_s: float | None = None
    ratio_to_peft_lora: float | None = None
    launches: int | None = None
    copies: int | None = None
    waits: int | None = None
    allocations: int | None = None
    operations: int | None = None
    planned_operations: int | None = None
    peak_bytes: int | None = None
    planned_bytes: int | None = None
    predicted: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Bench:
    """What all entries share; `ends` is a moment of `time.monotonic`, `model` holds the weights.

    budget: bytes of the device that each entry fills, as few of its blocks recomputed as that takes, 0 for what is
    free; None: blocks are recomputed as `workload` says.
    """

    workload: Workload
    device: torch.device
    model: Any
    machines: Sequence[Machine]
    rounds: int
    ends: float
    budget: int | None = None

    @property
    def gpu(self) -> GpuMemory | None:
        """What a plan counts beside tensors here."""
        return GpuMemory.here() if self.device.type == "cuda" else None


def measure(bench: Bench, entry: Entry) -> ModelRow:
    """Plan one entry's steps, take them, and return both."""
    row = _identity(bench, entry)
    if reason := entry.unavailable(bench.model):
        return replace(row, reason=reason)
    if time.monotonic() > bench.ends:
        return replace(row, reason="the time was over")
    # badam prints what it trains, on the standard output that belongs to the result.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            free = _free_bytes(bench)
            if bench.budget is not None:
                bench = replace(bench, workload=_filling(bench, entry, row, min(free, bench.budget or free)))
                row = _identity(bench, entry)
            row, wanted = _planned(bench, entry, row)
            if wanted > free:
                return replace(row, reason=f"it takes {gb(wanted)}, and {gb(free)} are free")
            return replace(row, **_taken(bench, entry))
        except torch.cuda.OutOfMemoryError as error:
            return replace(row, reason=f"planned to fit, and did not: {reason_of(error)}")
        except Exception as error:
            if entry.peer is None:
                raise
            return replace(row, reason=reason_of(error))
        finally:
            _clear(bench.device)


def _identity(bench: Bench, entry: Entry) -> ModelRow:
    workload = bench.workload
    blocks = workload.checkpointed_blocks or (entry.case.layers if workload.gradient_checkpointing else 0)
    return ModelRow(
        str(workload.model), bench.device.type, workload.dtype, workload.batch_size, workload.seq_len, blocks,
        entry.name, entry.title,
    )  # fmt: skip


def _filling(bench: Bench, entry: Entry, row: ModelRow, budget: int) -> Workload:
    """Return the workload with the fewest recomputed blocks by which the entry takes no more than a budget."""

    def recomputing(count: int) -> Workload:
        return replace(bench.workload, gradient_checkpointing=count > 0, checkpointed_blocks=count or None)

    def fits(count: int) -> bool:
        return _planned(replace(bench, workload=recomputing(count), machines=()), entry, row)[1] <= budget

    return recomputing(fewest_blocks(entry.case.layers, fits))


def _planned(bench: Bench, entry: Entry, row: ModelRow) -> tuple[ModelRow, int]:
    """Return the row with what a plan says, and the bytes that the device must have for it."""
    work, workload = WorkLog(), entry.asked(bench.workload)
    plan = Plan(workload, entry.planned(bench.workload, bench.gpu, work))
    predicted, steady = {}, None
    for machine in bench.machines:
        steady, switched = (predict(work, workload, machine, period) for period in (None, 1))
        predicted[machine.name] = {
            "step_ms": [1e3 * seconds for seconds in steady.step],
            "parts_ms": {part: [1e3 * seconds for seconds in each] for part, each in steady.parts.items()},
            "switch_ms": 1e3 * (sum(switched.step) - sum(steady.step)) / 2 if _switches(workload) else None,
            "bound_by": steady.bound_by, "bounds": dict(steady.bounds),
        }  # fmt: skip
    on_gpu = bench.gpu is not None
    row = replace(
        row, predicted=predicted, planned_operations=None if steady is None else steady.launches,
        planned_bytes=plan.allocated_bytes if on_gpu else plan.peak_bytes,
    )  # fmt: skip
    return row, plan.reserved().reserved if on_gpu else plan.peak_bytes


def _free_bytes(bench: Bench) -> int:
    """Return what a run may take here, the weights, which are there already, among it."""
    if bench.device.type == "cuda":
        return int(torch.cuda.mem_get_info(bench.device)[0]) + torch.cuda.memory_reserved(bench.device)
    return int(psutil.virtual_memory().available) + held_bytes(bench.model.parameters())


def _taken(bench: Bench, entry: Entry) -> dict[str, Any]:
    """Take the steps, and return what was measured."""
    facts = _timed(bench, entry)
    _clear(bench.device)
    work = WorkLog()
    trace = entry.counted(bench.workload, on_the_same_weights(bench.model), bench.device, work)
    return {"peak_bytes": trace.peak_bytes, **facts, "operations": _steady_operations(work)}


def _timed(bench: Bench, entry: Entry) -> dict[str, Any]:
    """Return the seconds of steps, and of a GPU the peak and what its profiler saw of one."""
    device, clock = bench.device, PartsClock(bench.device)
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) - held_bytes(bench.model.parameters())
    model, optimizer = entry.start(bench.workload, on_the_same_weights(bench.model), clock)
    batch = random_batch(bench.workload, bench.model)
    step = partial(_step, model, optimizer, batch, clock)
    first = [step()[0] for _ in range(WARM_UP)]
    taken = [step() for _ in range(LEAST_ROUNDS)]
    while len(taken) < bench.rounds and time.monotonic() < bench.ends:
        taken.append(step())
    facts = _times(entry.asked(bench.workload), first, taken)
    if on_gpu:
        facts["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    seen = seen_by_profiler(step, device)
    return facts if seen is None else {**facts, **asdict(seen)}


def _step(
    model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], clock: PartsClock
) -> tuple[dict[str, float], float]:  # fmt: skip
    clock.begin()
    clock.enter("forward")
    loss = model(**batch).loss
    clock.enter("backward")
    loss.backward()
    clock.enter("optimizer")
    optimizer.step()
    optimizer.zero_grad()
    return clock.seconds(), clock.host_seconds


def _times(
    workload: Workload, first: Sequence[dict[str, float]], taken: Sequence[tuple[dict[str, float], float]]
) -> dict[str, Any]:  # fmt: skip
    wholes = [sum(parts.values()) for parts, _ in taken]
    middle = {part: statistics.median(parts[part] for parts, _ in taken) for part in PARTS}
    whole = spread(wholes)
    switch = sum(first[2].values()) - whole.p50 + first[1]["optimizer"] - middle["optimizer"]
    return {
        "rounds": len(taken), **{f"{part}_ms": 1e3 * seconds for part, seconds in middle.items()},
        "switch_ms": 1e3 * switch if _switches(workload) else None, "step_ms": 1e3 * whole.p50,
        "step_ms_low": 1e3 * whole.p20, "step_ms_high": 1e3 * whole.p80,
        "host_ms": 1e3 * statistics.median(host for _, host in taken),
        "tokens_per_s": workload.batch_size * workload.seq_len / whole.p50,
    }  # fmt: skip


def _switches(workload: Workload) -> bool:
    return workload.method.get("period", None) is not None


def _steady_operations(work: WorkLog) -> int:
    parts = work.of_phases(lambda phase: phase.startswith("step 2:"))
    return sum(counts.total() for part, counts in parts.items() if part != "switch")


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        # Those of threads that are gone would count in the next one's peak.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def with_ratios(rows: Sequence[ModelRow]) -> list[ModelRow]:
    """Return the rows, each with its time beside that of peft's LoRA, where both have one."""
    base = next((row.step_ms for row in rows if row.name == LORA), None)
    return [
        replace(row, ratio_to_peft_lora=row.step_ms / base) if row.step_ms is not None and base is not None else row
        for row in rows
    ]


def prepare_bench(arguments: argparse.Namespace, console: Console) -> tuple[Bench, list[Entry]]:
    """Return what is to be measured; InputError for what cannot be, before anything takes time."""
    # A GPU is the one that is current: clocks and peaks are its.
    device = torch.device(parse_device(arguments.device))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = parse_dtype("auto" if arguments.dtype is None else arguments.dtype, device)
    check_dtype(dtype, device)
    config = load_config(arguments.model).get_text_config()
    case = Case(
        layers=int(config.num_hidden_layers), rank=arguments.rank, active_layers=arguments.active_layers,
        lora_rank=arguments.lora_rank, galore_rank=arguments.galore_rank,
    )  # fmt: skip
    entries = parse_entries(arguments.methods, case)
    blocks, budget = arguments.gradient_checkpointing, None
    if isinstance(blocks, str):
        budget = 0 if blocks == AUTO else parse_size(blocks)
        blocks = True
    workload = Workload(
        arguments.model, FullFineTune(), batch_size=arguments.batch or 1, seq_len=arguments.seq_len or 1024,
        dtype=NAMES[dtype], gradient_checkpointing=blocks is not False and blocks != 0,
        checkpointed_blocks=None if blocks is None or isinstance(blocks, bool) else blocks or None,
    )  # fmt: skip
    rounds = positive("rounds", arguments.rounds)
    ends = time.monotonic() + 60 * arguments.minutes
    console.print(f"building {arguments.model} in {workload.dtype} on {device}", highlight=False)
    model = real_model(workload, device)
    if blocks is None and sum(param.numel() for param in model.parameters()) < CHECKPOINTING_FROM:
        workload = replace(workload, gradient_checkpointing=False)
    return Bench(workload, device, model, _machines(device, dtype, console), rounds, ends, budget), entries


def _machines(device: torch.device, dtype: torch.dtype, console: Console) -> list[Machine]:
    if device.type != "cuda":
        from lisa_kernels.plan.this_cpu import ThisCpu

        return [ThisCpu(read_clock())]
    console.print("measuring copies, products and launches", highlight=False)
    known = known_card(torch.cuda.get_device_name(device))
    return [measure_rates(device, dtype), *([] if known is None else [known])]


def run(arguments: argparse.Namespace, console: Console) -> list[ModelRow]:
    """Measure what was asked for and show it; returns the rows."""
    if arguments.plot is not None:
        plots.check_picture(arguments.plot)
    set_threads(arguments.threads)
    bench, entries = prepare_bench(arguments, console)
    file = arguments.output or ROOT / "runs" / f"step-{bench.device.type}.jsonl"
    heads = [{"kind": "machine", **describe(), **environment()}]
    heads += [{"kind": "rates", **vars(machine)} for machine in bench.machines if not machine.is_cpu]
    rows: list[ModelRow] = []
    for entry in entries:
        console.print(f"{entry.name} …", highlight=False)
        rows = with_ratios([*rows, measure(bench, entry)])
        _write(file, [*heads, *({"kind": "step", **asdict(row)} for row in rows)])
    if not arguments.json:
        print_rows(rows)
    if arguments.record:
        for row in rows:
            append_row(ROWS, asdict(row))
    if arguments.plot is not None:
        plots.plot_model_steps([asdict(row) for row in rows], arguments.plot)
        console.print(f"picture in {arguments.plot}")
    console.print(f"all of it, to be sent: {file}", highlight=False, soft_wrap=True)
    return rows


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows anew: the file is whole after each, whatever ends the program."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.replace(file)
    except OSError as error:
        raise InputError(f"the rows could not be written to {str(file)!r} ({error.strerror}).") from error
