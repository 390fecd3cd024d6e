"""What every Triton kernel compiles to on seven GPU targets, without a GPU: the report of `make kernels`.

    python -m bench.kernels                     # compile, print, and record the present in bench/results/kernels.jsonl
    python -m bench.kernels --check             # exit with 1 where a kernel exceeds bench/results/kernel_budgets.json
    python -m bench.kernels --write-budgets     # record the present as the budgets

The time floors are arithmetic, not measurements: the larger of what the bytes take at the bandwidth that large
memory-bound kernels reach, and what the instructions take in the schedulers' issue slots. A kernel may be slower than
its floor for many reasons, among them latency, the rates of single units and the clock under load.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from bench.rows import RESULTS, environment, read_rows
from lisa_kernels.cli import USAGE_ERROR
from lisa_kernels.errors import InputError

NAME = "kernels"
BUDGETS = RESULTS / "kernel_budgets.json"
# The present of this machine says nothing about machine code; these versions do.
COMPILERS = ("torch", "triton")


class Gpu(NamedTuple):
    """A data sheet: bandwidth in GB/s (1e9 bytes), streaming multiprocessors, boost clock in GHz."""

    name: str
    target: str
    bandwidth_gb_s: float
    multiprocessors: int
    clock_ghz: float


# NVIDIA's data sheets and architecture white papers: A100 SXM 80 GB, GeForce RTX 3090 and 4090, H100 SXM5.
GPUS = (
    Gpu("A100", "sm_80", 2039, 108, 1.41),
    Gpu("RTX 3090", "sm_86", 936, 82, 1.695),
    Gpu("RTX 4090", "sm_89", 1008, 128, 2.52),
    Gpu("H100", "sm_90", 3350, 132, 1.98),
)
# The share of the data sheet's bandwidth that large memory-bound kernels reached on seven GPUs: worst and best.
BANDWIDTH_SHARE = (0.73, 0.88)
# The share of the issue slots at boost clock that a kernel fills: an assumption; the best is the hardware's limit.
ISSUE_SHARE = (0.8, 1.0)
SCHEDULERS, LANES = 4, 32
# Milliseconds per 1e9 elements in a nanosecond per element.
MS_PER_NS = 1e3


class Floor(NamedTuple):
    """A time floor in milliseconds per 1e9 elements, best and worst case, and what sets the best one."""

    best_ms: float
    worst_ms: float
    limit: str


def time_floor(gpu: Gpu, bytes_per_element: float, instructions_per_element: float | None) -> Floor:
    """Return the larger of the times that the bytes and the instructions take; the bytes' alone without a count."""
    slots_per_ns = gpu.multiprocessors * SCHEDULERS * LANES * gpu.clock_ghz
    memory = [MS_PER_NS * bytes_per_element / (share * gpu.bandwidth_gb_s) for share in BANDWIDTH_SHARE]
    issue = [MS_PER_NS * (instructions_per_element or 0.0) / (share * slots_per_ns) for share in ISSUE_SHARE]
    worst, best = (max(pair) for pair in zip(memory, issue))
    return Floor(round(best, 2), round(worst, 2), "memory" if best == memory[1] else "issue")


@dataclass(frozen=True)
class Row:
    """One kernel on one target; the resources are those of `bench.kernel_code.Resources`."""

    kernel: str
    target: str
    bytes_per_element: float
    registers: int
    spill_bytes: int
    local_accesses: int
    shared_bytes: int
    widest_load_bytes: int
    widest_store_bytes: int
    instructions_per_element: float | None
    occupancy: float | None
    floors: dict[str, Floor]

    @property
    def key(self) -> str:
        """The name of this row's budget."""
        return f"{self.kernel} {self.target}"


def target_name(target: int | str) -> str:
    """Return a target as the tables name it."""
    return f"sm_{target}" if isinstance(target, int) else target


def measure(kernel: str, target: str) -> Row:
    """Compile one kernel of `bench.kernel_code.KERNELS` for one target and read its machine code."""
    from bench import kernel_code

    variant = next(variant for variant in kernel_code.KERNELS if variant.name == kernel)
    number = next(number for number in kernel_code.TARGETS if target_name(number) == target)
    launch = variant.launch(number)
    compiled = kernel_code.compile_for(launch, number)
    found = kernel_code.resources(compiled, launch, number, variant.elements_per_program)
    traffic = variant.bytes_per_element
    floors = {
        gpu.name: time_floor(gpu, traffic, found.instructions_per_element) for gpu in GPUS if gpu.target == target
    }
    return Row(kernel=kernel, target=target, bytes_per_element=traffic, floors=floors, **asdict(found))


def measure_all(pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """Return the rows of many (kernel, target), on all cores; Triton keeps what it has compiled before."""
    workers = min(os.cpu_count() or 1, len(pairs))
    # A fresh process per worker: a fork would inherit the thread pools of torch and LLVM in an unknown state.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(measure, *zip(*pairs), chunksize=4))


# A number may be at most its budget, but these must be at least theirs.
AT_MOST = ("registers", "spill_bytes", "local_accesses", "shared_bytes", "instructions_per_element")
AT_LEAST = ("widest_load_bytes", "widest_store_bytes")
# What another version of the compiler may add before somebody must look.
INSTRUCTION_SLACK = 1.02
Budgets = dict[str, dict[str, float]]


def budget_of(row: Row) -> dict[str, float]:
    """Return the limits that a row's present numbers set; what its target does not tell has none."""
    limits = {name: getattr(row, name) for name in (*AT_MOST, *AT_LEAST) if getattr(row, name) is not None}
    if row.instructions_per_element is not None:
        limits["instructions_per_element"] = round(row.instructions_per_element * INSTRUCTION_SLACK, 1)
    return limits


def exceeded(rows: Iterable[Row], budgets: Budgets) -> list[str]:
    """Return one sentence for each number that breaks its budget, and for each row that has none."""
    complaints = []
    for row in rows:
        if row.key not in budgets:
            complaints.append(f"{row.key} has no budget: record it with --write-budgets")
        for name, limit in budgets.get(row.key, {}).items():
            now = getattr(row, name)
            if now is None or (now < limit if name in AT_LEAST else now > limit):
                complaints.append(f"{row.key}: {name} is {now}, {'below' if name in AT_LEAST else 'above'} its {limit}")
    return complaints


def read_budgets() -> Budgets:
    """Return the recorded limits by kernel and target."""
    budgets: Budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    return budgets


def write_budgets(rows: Sequence[Row], complete: bool) -> None:
    """Record the present numbers of some rows as their budgets; `complete`: of kernels that are gone, drop theirs."""
    budgets = ({} if complete else read_budgets()) | {row.key: budget_of(row) for row in rows}
    lines = [f"  {json.dumps(key)}: {json.dumps(budgets[key])}" for key in sorted(budgets)]
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def record(rows: Sequence[Row], complete: bool) -> None:
    """Write rows over the earlier ones of the same kernels and targets; one that says the same as before stays.

    `complete`: rows of kernels that are gone are dropped.
    """
    earlier = {f"{row['kernel']} {row['target']}": row for row in read_rows(NAME)}
    present = {} if complete else dict(earlier)
    here = environment()
    versions = {name: here["versions"].get(name) for name in COMPILERS}
    for row in rows:
        new = json.loads(json.dumps(asdict(row)))
        old = earlier.get(row.key, {})
        same = all(old.get(name) == value for name, value in new.items()) and old.get("versions") == versions
        present[row.key] = (
            old if same else {**new, "commit": here["commit"], "versions": versions, "date": here["date"]}
        )
    path = RESULTS / f"{NAME}.jsonl"
    RESULTS.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(present[key]) + "\n" for key in sorted(present)))
    unfinished.replace(path)


def _range(values: Iterable[float | None]) -> str:
    """Return `low–high` of what is known, one number where they are equal."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = f"{min(known):.0f}", f"{max(known):.0f}"
    return low if low == high else f"{low}–{high}"


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print the machine code of each kernel over its targets, and its time floors."""
    targets = list(dict.fromkeys(row.target for row in rows))
    compact: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": 0, "title_justify": "left"}
    code = Table(title=f"Machine code on {', '.join(targets)}", **compact)
    headings = ("regs", "spill", "shared", "load", "store", "instr", "occ %")
    floors = Table(title="Time floors, ms per 1e9 elements: arithmetic, not measured", **compact)
    for table, columns in ((code, headings), (floors, ("bytes", *(gpu.name for gpu in GPUS)))):
        table.add_column("kernel", no_wrap=True, min_width=max(len(row.kernel) for row in rows))
        for heading in columns:
            table.add_column(heading, justify="right", no_wrap=True)
    for kernel in dict.fromkeys(row.kernel for row in rows):
        mine = [row for row in rows if row.kernel == kernel]
        names = ("registers", "spill_bytes", "shared_bytes", "widest_load_bytes", "widest_store_bytes")
        numbers = [_range(getattr(row, name) for row in mine) for name in (*names, "instructions_per_element")]
        percent = _range(100 * row.occupancy for row in mine if row.occupancy is not None)
        code.add_row(kernel, *numbers, percent)
        known = {gpu: floor for row in mine for gpu, floor in row.floors.items()}
        cells = [_floor_cell(known.get(gpu.name)) for gpu in GPUS]
        floors.add_row(kernel, f"{mine[0].bytes_per_element:.2f}", *cells)
    console.print(code)
    console.print(floors)
    console.print(
        "spills, shared memory and widest accesses in bytes; instr: issue slots per 32 elements, - for loops; "
        "occ: occupancy; *: a floor set by instructions, not bytes (of loops, bytes alone)",
        highlight=False,
    )


def _floor_cell(floor: Floor | None) -> str:
    if floor is None:
        return "-"
    return f"{floor.best_ms:.1f}–{floor.worst_ms:.1f}{'*' if floor.limit == 'issue' else ' '}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kernel", default="", help="only kernels with this in their name (default: all)")
    parser.add_argument("--target", action="append", help="only this target, as sm_90; may be repeated (default: all)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a kernel exceeds its budget")
    parser.add_argument("--write-budgets", action="store_true", help="record the present numbers as the budgets")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON on standard output")
    return parser


def _chosen(kernel: str, targets: Sequence[str] | None) -> tuple[list[tuple[str, str]], bool]:
    """Return the chosen pairs, and whether they are all there are."""
    if importlib.util.find_spec("triton") is None:
        raise InputError("Triton is not installed, and its compiler makes these numbers: install it, on Linux")
    from bench import kernel_code

    known = [target_name(target) for target in kernel_code.TARGETS]
    unknown = [target for target in targets or [] if target not in known]
    if unknown:
        raise InputError(f"there is no target {unknown[0]}: choose from {', '.join(known)}")
    names = [variant.name for variant in kernel_code.KERNELS if kernel in variant.name]
    if not names:
        raise InputError(f"no kernel has {kernel!r} in its name: leave --kernel out to see them all")
    return [(name, target) for name in names for target in targets or known], not (kernel or targets)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the report; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=options.json)
    try:
        pairs, complete = _chosen(options.kernel, options.target)
    except InputError as error:
        console.print(f"error: {error}", style="red", highlight=False)
        return USAGE_ERROR
    rows = measure_all(pairs)
    record(rows, complete)
    if options.write_budgets:
        write_budgets(rows, complete)
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        print_rows(rows, console)
    complaints = exceeded(rows, read_budgets()) if options.check else []
    for complaint in complaints:
        console.print(complaint, style="red", highlight=False)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
