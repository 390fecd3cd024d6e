"""The table of `bench/results/quality.jsonl`, printed and written into bench/README.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.readme import markdown, put
from bench.rows import read_rows


def best_rows(rows: list[dict[str, Any]], name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return one row per seed at the contestant's best rate on the first seed; empty while seeds are missing."""
    mine = [row for row in rows if row["contestant"] == name]
    tuned = [row for row in mine if row["seed"] == seeds[0]]
    if not tuned:
        return []
    best = min(tuned, key=lambda row: row["eval_loss"])
    found = [next((row for row in mine if row["seed"] == seed and row["lr"] == best["lr"]), None) for seed in seeds]
    return [row for row in found if row is not None] if None not in found else []


def table(rows: list[dict[str, Any]], names: Sequence[str], seeds: Sequence[int]) -> str:
    """Return the Markdown table, best mean first."""
    lines = []
    for name in names:
        mine = best_rows(rows, name, seeds)
        if not mine:
            continue
        losses = [row["eval_loss"] for row in mine]
        mean, deviation = statistics.mean(losses), statistics.stdev(losses) if len(losses) > 1 else 0.0
        lines.append((mean, [name, f"{mean:.3f} ± {deviation:.3f}", f"{mine[0]['lr']:g}"]))
    head = ["method", "held-out loss, mean ± sd of 3 seeds", "best rate"]
    return markdown(head, [line for _, line in sorted(lines)])


def report(names: Sequence[str], seeds: Sequence[int]) -> None:
    """Print the table and put it between the markers of bench/README.md, if they are there."""
    text = table(read_rows("quality"), names, seeds)
    print(text)
    put("quality", text)
