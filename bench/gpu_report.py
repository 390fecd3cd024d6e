"""The file that `make gpu` leaves: a head for people, and every row that was found as JSON beneath it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lisa_kernels.info import gpu_lines

Row = dict[str, Any]
FENCE = "```"
# What becomes of a stage; where one is stopped, those after it would mean nothing and do not run.
DONE, STOPPED, FAILED, LEFT_OUT = "done", "stopped", "failed", "left out"


@dataclass
class Report:
    """Rows as they are found; the file is whole after each, whatever ends the program."""

    path: Path
    rows: list[Row] = field(default_factory=list)

    def add(self, kind: str, **facts: Any) -> None:
        """Append a row, and write the file anew."""
        self.rows.append({"kind": kind, **facts})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "\n".join(json.dumps(row) for row in self.rows)
        head = "\n".join(head_of(self.rows))
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(f"{head}\n\n## Rows\n\n{FENCE}json\n{lines}\n{FENCE}\n")
        os.replace(partial, self.path)


def read_report(path: Path) -> list[Row]:
    """Return the rows of a file that was sent."""
    lines = path.read_text().split(f"{FENCE}json\n")[1].split(f"\n{FENCE}")[0]
    return [json.loads(line) for line in lines.splitlines()]


def rows_of(rows: Sequence[Row], kind: str) -> list[Row]:
    """Return the rows of one kind."""
    return [row for row in rows if row["kind"] == kind]


def troubles(rows: Sequence[Row]) -> list[str]:
    """Return what is wrong, the first that was met first."""
    found = []
    for row in rows:
        if row["kind"] == "stage" and row["outcome"] != DONE:
            found.append(f"{row['name']} {row['outcome']}: {row['reason']}")
        elif row["kind"] == "kernel" and row["problem"]:
            found.append(f"kernel {row['op']}: {row['problem']}")
        elif row["kind"] in ("method", "memory") and row["problem"]:
            found.append(f"{row['kind']} {row['name']} {row['dtype']}: {row['problem']}")
        elif row["kind"] == "tests":
            found += [f"{each['test']}: {each['message']}" for each in row["failures"]]
    return found


def head_of(rows: Sequence[Row]) -> list[str]:
    """Return the lines that are read first: verdict, machine, what is wrong, and then the numbers."""
    wrong = troubles(rows)
    machine = next(iter(rows_of(rows, "machine")), None)
    card = machine["gpus"][0]["name"] if machine and machine["gpus"] else "no GPU"
    unfinished = "" if rows_of(rows, "end") else " so far"
    verdict = f"{len(wrong)} found wrong{unfinished}, the first: {wrong[0]}" if wrong else f"nothing wrong{unfinished}"
    lines = [f"# {card}: {verdict}", ""]
    if machine is not None:
        environment = machine["environment"]
        packages = {**machine["packages"], **environment["versions"]}
        versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
        lines += [f"- {line}" for line in gpu_lines(machine)]
        lines += [f"- commit {environment['commit']}, {environment['date']}, Python {machine['python']}, {versions}"]
    lines += _summaries(rows)
    if wrong:
        lines += ["", "## Wrong", "", *(f"{number}. {text}" for number, text in enumerate(wrong, 1))]
    for title, table in (("Methods", _methods(rows)), ("Memory", _memory(rows)), ("Times", _times(rows))):
        if len(table) > 2:
            lines += ["", f"## {title}", "", *table]
    return lines


def _summaries(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows_of(rows, "tests"):
        counts = ", ".join(f"{row[name]} {name}" for name in ("passed", "failed", "skipped"))
        lines.append(f"- {row['path']}: {counts}, in {row['seconds']:.0f} s")
    for kind, title in (("kernel", "kernels right"), ("method", "methods as on the CPU"), ("memory", "plans kept")):
        found = rows_of(rows, kind)
        if found:
            lines.append(f"- {title}: {sum(not row['problem'] for row in found)} of {len(found)}")
    stages = [f"{row['name']} {row['seconds']:.0f} s" for row in rows_of(rows, "stage")]
    return [*lines, f"- time: {', '.join(stages)}"] if stages else lines


def _table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def _methods(rows: Sequence[Row]) -> list[str]:
    columns = ("method", "dtype", "loss, first", "last", "the CPU's, fp32", "furthest apart", "ms a step")
    return _table(columns, [
        (row["name"], row["dtype"], f"{row['losses'][0]:.4f}", f"{row['losses'][-1]:.4f}",
         f"{row['cpu_losses'][-1]:.4f}", f"{row['largest_difference']:.1e}", f"{row['ms_per_step']:.1f}")
        for row in rows_of(rows, "method") if row["losses"]
    ])  # fmt: skip


def _memory(rows: Sequence[Row]) -> list[str]:
    columns = ("method", "model", "planned MB", "measured MB", "measured above planned", "reserved MB")
    return _table(columns, [
        (row["name"], row["model"], f"{row['planned_bytes'] / 1e6:,.1f}", f"{row['measured_bytes'] / 1e6:,.1f}",
         f"{row['measured_bytes'] / row['planned_bytes'] - 1:+.2%}", f"{row['reserved_bytes'] / 1e6:,.1f}")
        for row in rows_of(rows, "memory") if row["measured_bytes"]
    ])  # fmt: skip


def _times(rows: Sequence[Row]) -> list[str]:
    columns = ("benchmark", "what", "dtype", "size", "ms", "forward", "backward", "optimizer", "of a copy's speed")
    return _table(columns, [
        (row["bench"], row["name"], row["dtype"], _size(row), _number(_milliseconds(row)),
         *(_number(row.get(name)) for name in ("forward_ms", "backward_ms", "optimizer_ms", "copy_share")))
        for row in rows_of(rows, "time") if not row.get("reason")
    ])  # fmt: skip


def _size(row: Row) -> str:
    if row["bench"] == "optimizer":
        return f"{row['tensors']} × {row['elements'] // row['tensors']}"
    return row["geometry"] if row["bench"] == "step" else f"{row['inputs']} → {row['outputs']}"


def _milliseconds(row: Row) -> float | None:
    return next((row[name] for name in ("step_ms", "p50_ms", "update_ms") if row.get(name) is not None), None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
