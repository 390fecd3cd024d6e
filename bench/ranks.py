"""Several processes that train one model: what they send, ours and peers', and how fast two are beside one.

    python -m bench.ranks bytes            # MB a step of each method and peer, counted where collectives begin
    python -m bench.ranks speed            # tokens/s of two processes against one, a thread each
    python -m bench.ranks speed --rate 1gbit   # the same in two network namespaces (root), and what the plan says

Every rank is a process of its own. Times are medians over steps in which all ranks begin together.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.command import main_of, table_console
from bench.link import End, limited_link
from bench.rank_contestants import CONTESTANTS, Setting
from lisa_kernels.errors import unknown_name

DEFAULTS = Setting()


@dataclass(frozen=True)
class Row:
    """One contestant on so many ranks, on average over steps: bytes that leave each, seconds, and tokens of all."""

    contestant: str
    ranks: int
    sent_bytes: float
    formula_7b_bytes: float | None
    step_seconds: float
    cpu_seconds: float
    summing_seconds: float
    tokens_per_second: float
    rate: str | None = None
    planned_seconds: tuple[float, float] | None = None


def run_ranks(
    contestants: Sequence[str], count: int, setting: Setting, ends: tuple[End, End] | None = None
) -> list[dict[str, Any]]:
    """Run contestants in turn on so many processes; returns rank 0's figures of each."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    address = "127.0.0.1" if ends is None else ends[0].address
    told = json.dumps({"contestants": contestants, **asdict(setting)})
    processes = []
    for rank in range(count):
        words = [sys.executable, "-m", "bench.rank_contestants", told]
        more = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": count, "MASTER_ADDR": address, "MASTER_PORT": port}
        more |= {"OMP_NUM_THREADS": 1} | ({} if ends is None else {"GLOO_SOCKET_IFNAME": ends[rank].device})
        environment = {**os.environ, **{name: str(value) for name, value in more.items()}}
        words = words if ends is None else ends[rank].inside(words)
        processes.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))
    answers = [process.communicate()[0] for process in processes]
    for process in processes:
        if process.returncode:
            raise RuntimeError(f"{count} ranks of {', '.join(contestants)} ended with {process.returncode}")
    found: list[dict[str, Any]] = json.loads(answers[0].splitlines()[-1])
    return found


def measure(contestants: Sequence[str], count: int, setting: Setting, rate: str | None = None) -> list[Row]:
    """Return the figures of contestants, over a limited link if a rate is given."""
    with nullcontext() if rate is None else limited_link(rate) as ends:
        found = run_ranks(contestants, count, setting, ends)
    return [_row(name, count, setting, each, rate) for name, each in zip(contestants, found)]


def _row(name: str, count: int, setting: Setting, found: dict[str, Any], rate: str | None) -> Row:
    seconds, cpu, summing = (statistics.median(found[kind]) for kind in ("seconds", "cpu", "summing"))
    tokens = count * setting.rows * setting.columns / seconds
    return Row(
        name, count, found["sent"], found["formula_7b"], seconds, cpu, summing, tokens, rate,
        planned_seconds=found["planned"],
    )  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("what", choices=["bytes", "speed"])
    add("--only", action="append", help="a contestant; may be given several times")
    add("--rate", help="of a link between two network namespaces, as tc writes it: 1gbit (needs root)")
    for name in ("layers", "width", "intermediate", "vocabulary", "rows", "columns", "steps"):
        add(f"--{name}", type=int, default=getattr(DEFAULTS, name))
    add("--rounds", type=int, default=3, help="of one and two ranks in turns")
    add("--json", action="store_true", help="print rows as JSON")
    add("--debug", action="store_true", help="show where mistakes were found")


def run(arguments: argparse.Namespace, console: Console) -> Sequence[Row]:
    """Measure, and print a table."""
    names = ("layers", "width", "intermediate", "vocabulary", "rows", "columns", "steps")
    setting = Setting(**{name: getattr(arguments, name) for name in names})
    chosen = arguments.only or (list(CONTESTANTS) if arguments.what == "bytes" else ["OwLore"])
    for name in chosen:
        if name not in CONTESTANTS:
            raise unknown_name("contestant", name, CONTESTANTS)
    if arguments.what == "bytes":
        rows = measure(chosen, 2, setting)
        if not arguments.json:
            print_bytes(rows, table_console())
        return rows
    rows = []
    for _ in range(arguments.rounds):
        rows += [*measure(chosen, 1, setting), *measure(chosen, 2, setting, arguments.rate)]
    if not arguments.json:
        print_speed(rows, table_console())
    return rows


def print_bytes(rows: Sequence[Row], console: Console) -> None:
    """Print what leaves each rank in a step."""
    table = Table("two ranks, bf16 weights", "sent by each, MB a step", "Llama-2-7B by formula, MB", box=None)
    for row in rows:
        formula = "" if row.formula_7b_bytes is None else f"{row.formula_7b_bytes / 1e6:,.0f}"
        table.add_row(row.contestant, f"{row.sent_bytes / 1e6:.3f}", formula)
    console.print(table)


def print_speed(rows: Sequence[Row], console: Console) -> None:
    """Print times, and two ranks beside one: by the clock, and by the CPU time of each."""
    table = Table("contestant", "ranks", "link", "s a step", "CPU s", "of it sums", "plan", "tokens/s", box=None)
    kinds = dict.fromkeys((row.contestant, row.ranks, row.rate) for row in rows)
    best = {}
    for kind in kinds:
        those = [row for row in rows if (row.contestant, row.ranks, row.rate) == kind]
        row = best[kind] = min(those, key=lambda each: each.step_seconds)
        planned = (
            "" if row.rate is None or row.planned_seconds is None else "{:.3f}-{:.3f}".format(*row.planned_seconds)
        )
        table.add_row(
            row.contestant, str(row.ranks), row.rate or "loopback", f"{row.step_seconds:.3f}",
            f"{min(each.cpu_seconds for each in those):.3f}", f"{min(each.summing_seconds for each in those):.3f}",
            planned, f"{row.tokens_per_second:,.0f}",
        )  # fmt: skip
    console.print(table)
    for (name, count, rate), row in best.items():
        alone = best[name, 1, None]
        if count > 1:
            cpu = [min(each.cpu_seconds for each in rows if (each.contestant, each.ranks, each.rate) == kind)
                   for kind in ((name, 1, None), (name, count, rate))]  # fmt: skip
            console.print(
                f"{name}, {rate or 'loopback'}: {count} ranks have "
                f"{row.tokens_per_second / alone.tokens_per_second:.2f} times the tokens/s of one; "
                f"by CPU time of each process {count * cpu[0] / cpu[1]:.2f} times"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    return main_of("ranks", "Several processes that train one model.", add_options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
