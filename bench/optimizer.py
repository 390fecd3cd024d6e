"""One optimizer step, side by side: `AdamW8bit` and the optimizers people use, in one process and in turns.

    lisa-kernels bench optimizer                # or python -m bench.optimizer, from a checkout of the sources
    lisa-kernels bench optimizer --help

A whole `optimizer.step()` is timed, with everything the class does around its kernels. Weights and gradients of one
dtype are shared by all contestants; each has its own state.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from bench import plots
from bench.command import main_of, parse_device, positive, set_threads
from bench.held_bytes import free_bytes
from bench.optimizer_cases import Case, Entry, Row, Running, identity, start, why_not
from bench.optimizer_table import print_rows
from bench.peers import CONTESTANTS, DTYPES, YARDSTICK, parse_peers
from bench.rows import append_row
from bench.timing import COPY_BYTES, copy_clock, interleave, spread
from lisa_kernels.commands.bench import add_bench_optimizer_options
from lisa_kernels.errors import InputError, unknown_name

SMALL_TENSORS, SMALL_ELEMENTS = 10_000, 1_024
LARGEST_SIZE = 1 << 34
RANGE_FACTOR = 4
# What a step may hold for itself, per element, where memory is short: torch's foreach holds one fp32 copy.
STEP_BYTES = 4


def lacking_memory(entries: Sequence[Entry], case: Case) -> str | None:
    """Return why the entries do not fit into memory side by side, or None."""
    weights_and_gradients = sum(2 * DTYPES[dtype].itemsize for dtype in {entry.dtype for entry in entries})
    per_element = weights_and_gradients + sum(entry.moment_bytes() for entry in entries) + STEP_BYTES
    wanted, free = per_element * case.elements + 2 * COPY_BYTES, free_bytes(case.device)
    if wanted <= 0.95 * free:
        return None
    return f"all need {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} are free: fewer --peers, one --dtype"


def measure(case: Case, entries: Sequence[Entry], rounds: int, limits: bool, console: Console) -> list[Row]:
    """Run the entries of one case in turns; returns a row for each, in order."""
    reasons = {entry: why_not(entry, case, limits) for entry in entries}
    if shortage := lacking_memory([entry for entry, reason in reasons.items() if reason is None], case):
        reasons = {entry: reason or shortage for entry, reason in reasons.items()}
    params = functools.cache(lambda dtype: case.params(DTYPES[dtype]))
    running: dict[Entry, Running] = {}
    for entry, reason in reasons.items():
        if reason is None:
            console.print(f"  warming up {entry}", highlight=False)
            started = start(entry, case, params(entry.dtype), rounds)
            if isinstance(started, Running):
                running[entry] = started
            else:
                reasons[entry] = started
    if not running:
        return [Row(**identity(case, entry), reason=reason) for entry, reason in reasons.items()]
    readings = interleave(
        [*(one.read_clock for one in running.values()), copy_clock(case.device)],
        [*(one.rounds for one in running.values()), rounds],
    )
    times = {entry: spread(reading) for entry, reading in zip(running, readings)}
    copy_gb_s = 2 * COPY_BYTES / spread(readings[-1]).p50 / 1e9
    yardstick = times.get(Entry(CONTESTANTS[YARDSTICK], "fp32"))
    return [
        running[entry].row(times[entry], copy_gb_s, yardstick)
        if entry in running
        else Row(**identity(case, entry), reason=reason)
        for entry, reason in reasons.items()
    ]


def parse_sizes(text: str) -> list[int]:
    """Return the sizes that `2^20,2^24`, `1000` or `2^12..2^28` (in factors of 4) stand for, each once, ascending."""
    sizes = set()
    for part in text.split(","):
        ends = [_size(word, text) for word in part.split("..")]
        if len(ends) > 2 or ends[0] > ends[-1]:
            raise _bad_size(part, text)
        size = ends[0]
        while size < ends[-1]:
            sizes.add(size)
            size *= RANGE_FACTOR
        sizes.add(ends[-1])
    return sorted(sizes)


def _size(word: str, text: str) -> int:
    match = re.fullmatch(r"\s*(2\^)?(\d{1,11})\s*", word)
    if match is None:
        raise _bad_size(word, text)
    number = int(match[2])
    if match[1]:
        number = 1 << min(number, 64)
    if not 1 <= number <= LARGEST_SIZE:
        raise _bad_size(word, text)
    return number


def _bad_size(word: str, text: str) -> InputError:
    return InputError(
        f"--sizes {text!r}: {word!r} is no size from 1 to 2^34; write 2^20, 1000, several with commas, "
        f"or a range such as 2^12..2^28."
    )


def parse_dtypes(text: str) -> list[str]:
    """Return the dtypes that `fp32`, `bf16` or `all` stand for; InputError for others."""
    if text != "all" and text not in DTYPES:
        raise unknown_name("dtype", text, [*DTYPES, "all"])
    return list(DTYPES) if text == "all" else [text]


def run(arguments: argparse.Namespace, console: Console) -> list[Row]:
    """Check what was asked for, measure every case and show it; returns the rows."""
    sizes, device, dtypes = parse_sizes(arguments.sizes), parse_device(arguments.device), parse_dtypes(arguments.dtype)
    rounds = positive("rounds", arguments.rounds)
    if arguments.plot is not None:
        plots.check_picture(arguments.plot)
    entries = [Entry(contestant, dtype) for dtype in dtypes for contestant in parse_peers(arguments.peers)]
    yardstick = Entry(CONTESTANTS[YARDSTICK], "fp32")
    if yardstick not in entries:
        entries.append(yardstick)
    set_threads(arguments.threads)
    cases = [Case(device, size) for size in sizes]
    if arguments.small_tensors:
        cases.append(Case(device, SMALL_ELEMENTS, SMALL_TENSORS))
    rows = []
    for case in cases:
        console.print(f"{case.tensors:,} × {case.elements_each:,} elements on {device}", highlight=False)
        found = measure(case, entries, rounds, not arguments.no_limits, console)
        rows += found
        if not arguments.json:
            print_rows(found)
        if arguments.record:
            for row in found:
                append_row("optimizer", {**asdict(row), "ran_on": row.device})
    if arguments.plot is not None:
        plots.plot_sizes([asdict(row) for row in rows if row.tensors == 1], arguments.plot)
        console.print(f"picture in {arguments.plot}")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, or 2 for a mistake in what was given."""
    return main_of("optimizer", "Time one optimizer step.", add_bench_optimizer_options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
