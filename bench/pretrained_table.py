"""The table of `bench/results/pretrained.jsonl`, printed and written into bench/README.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.pretrained_tasks import Size
from bench.readme import markdown, put
from bench.rows import read_rows

FULL, BEFORE, PEER = "full fine-tuning, torch AdamW fp32", "before training", "peft LoRA r = 16"
Row = dict[str, Any]


def counted_rows(rows: list[Row], name: str, seeds: Sequence[int]) -> list[Row]:
    """Return the rows of one contestant's counted seeds, all at the rate of which most of them are there.

    Before training every seed is the same.
    """
    mine = [row for row in rows if row["contestant"] == name and (row["seed"] in seeds or name == BEFORE)]
    if not mine:
        return []
    rate = statistics.mode(row["lr"] for row in mine)
    return list({row["seed"]: row for row in mine if row["lr"] == rate}.values())


def paired(rows: Sequence[Row], others: Sequence[Row]) -> tuple[float, float] | None:
    """Return mean and standard deviation over seeds of loss / other's loss − 1, on the same rows in the same order."""
    by_seed = {row["seed"]: row["answer_loss"] for row in others}
    apart = [row["answer_loss"] / by_seed[row["seed"]] - 1 for row in rows if row["seed"] in by_seed]
    if not apart:
        return None
    return statistics.mean(apart), statistics.stdev(apart) if len(apart) > 1 else float("nan")


def time_to_quality(rows: Sequence[Row], peers: Sequence[Row]) -> float | None:
    """Return the median over seeds of the seconds to a peer's last loss, in those that the peer took; None: never.

    Both losses are of the answers that are asked on the way; a curve is read at its points, from above.
    """
    by_seed = {row["seed"]: row["curve"] for row in peers if row["curve"]}
    found = []
    for row in rows:
        if row["seed"] not in by_seed:
            continue
        _, whole, wanted = by_seed[row["seed"]][-1]
        reached = [seconds for _, seconds, loss in row["curve"] if loss <= wanted]
        found.append(reached[0] / whole if reached else float("inf"))
    middle = statistics.median(found) if found else float("inf")
    return None if middle == float("inf") else float(middle)


def table(rows: list[Row], names: Sequence[str], seeds: Sequence[int]) -> str:
    """Return the Markdown table, best mean first."""
    full, peers, lines = counted_rows(rows, FULL, seeds), counted_rows(rows, PEER, seeds), []
    for name in dict.fromkeys((BEFORE, *names)):
        mine = counted_rows(rows, name, seeds)
        if not mine:
            continue
        mean = statistics.mean(row["answer_loss"] for row in mine)
        known = [row["known_loss"] for row in mine if row.get("known_loss") is not None]
        right = [row_accuracy(row) for row in mine if "accuracies" in row]
        lines.append((mean, [
            name, f"{mean:.4f}", *([""] * 5 if name == BEFORE else _effort(mine, full, peers)),
            f"{statistics.mean(known):.3f}" if known else "-", *([f"{statistics.mean(right):.1%}"] if right else []),
        ]))  # fmt: skip
    head = [
        "method", "answer loss", "against full fine-tuning", "seeds", "rate", "CPU s a step",
        "time to LoRA's loss",
        "loss of what it knew", *(["accuracy"] if rows and "accuracies" in rows[-1] else []),
    ]  # fmt: skip
    return markdown(head, [line for _, line in sorted(lines)])


def _effort(mine: Sequence[Row], full: Sequence[Row], peers: Sequence[Row]) -> list[str]:
    """Return the cells of one trained contestant between its loss and what it knew."""
    against = paired(mine, full) if mine[0]["contestant"] != FULL else None
    seconds = statistics.median(row["cpu_seconds"] / row["steps"] for row in mine)
    sooner = time_to_quality(mine, peers)
    return [
        "" if against is None else f"{against[0]:+.1%} ± {against[1]:.1%}", f"{len(mine)}", f"{mine[0]['lr']:g}",
        f"{seconds:.1f}", "-" if sooner is None else f"{sooner:.2f}×",
    ]  # fmt: skip


def row_accuracy(row: Row) -> float:
    """Return the mean accuracy of a row's test sets."""
    return float(statistics.mean(row["accuracies"].values()))


def task_table(task: str, names: Sequence[str], seeds: Sequence[int], size: Size) -> str:
    """Return the table of one task's recorded runs of one size."""
    alike = [row for row in read_rows("pretrained") if row["task"] == task and size.key().items() <= row.items()]
    return table(alike, names, seeds)


def report(task: str, names: Sequence[str], seeds: Sequence[int], size: Size) -> None:
    """Print the table of one task and put it between the markers of bench/README.md, if they are there."""
    text = task_table(task, names, seeds, size)
    print(text)
    put(f"pretrained {task}", text)
