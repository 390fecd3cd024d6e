"""The table of `bench/results/pretrained.jsonl`, printed and written into bench/README.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.pretrained_tasks import FIRST_FIT, FULL_ROWS, Size
from bench.readme import markdown, put
from bench.rows import read_rows

GRID_SEED = 100
FULL, BEFORE, PEER = "full fine-tuning, torch AdamW fp32", "before training", "peft LoRA r = 16"
PEAKS = ("peak_bytes_over_weights", "peak_bytes_over_weights_checkpointed")
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
    """Return mean and standard deviation over seeds of loss / other's loss − 1, on the same rows in the same order.

    Raises ValueError for two that were taught other rows on one seed.
    """
    by_seed = {row["seed"]: row for row in others}
    pairs = [(row, by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
    for row, other in pairs:
        if row.get("taught_crc32", other.get("taught_crc32")) != other.get("taught_crc32", row.get("taught_crc32")):
            names = f"{row['contestant']} and {other['contestant']}"
            raise ValueError(f"{names} were taught different rows on seed {row['seed']}; name how they were packed.")
    apart = [row["answer_loss"] / other["answer_loss"] - 1 for row, other in pairs]
    if not apart:
        return None
    return statistics.mean(apart), statistics.stdev(apart) if len(apart) > 1 else float("nan")


def steps_to_quality(rows: Sequence[Row], peers: Sequence[Row]) -> float | None:
    """Return the median over seeds of the steps to a peer's last loss, in those of its run; None: never in most.

    Both losses are of the answers that are asked on the way; between its points a curve is taken to be straight.
    """
    by_seed = {row["seed"]: row["curve"] for row in peers if row["curve"]}
    found = [_crossing(row["curve"], by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed and row["curve"]]
    middle = statistics.median(found) if found else math.inf
    return None if middle == math.inf else middle


def _crossing(curve: list[list[float]], peer: list[list[float]]) -> float:
    whole, _, wanted = peer[-1]
    before: list[float] | None = None
    for at, _, loss in curve:
        if loss <= wanted:
            share = 0.0 if before is None else (loss - wanted) / (loss - before[1])
            return (at - share * (at - (before[0] if before else at))) / whole
        before = [at, loss]
    return math.inf


def table(rows: list[Row], names: Sequence[str], seeds: Sequence[int], cost_rows: Sequence[Row] = ()) -> str:
    """Return the Markdown table, best mean first; cost_rows: of `bench.pretrained_cost`."""
    costs: dict[str, Row] = {}
    for row in cost_rows:
        costs.setdefault(row["contestant"], {}).update(row)
    full, peers, lines = counted_rows(rows, FULL, seeds), counted_rows(rows, PEER, seeds), []
    for name in dict.fromkeys((BEFORE, *names)):
        mine = counted_rows(rows, name, seeds)
        if not mine:
            continue
        mean = statistics.mean(row["answer_loss"] for row in mine)
        known = [row["known_loss"] for row in mine if row.get("known_loss") is not None]
        right = [row_accuracy(row) for row in mine if "accuracies" in row]
        lines.append((mean, [
            name, f"{mean:.4f}", *([""] * 8 if name == BEFORE else _effort(mine, full, peers, costs)),
            f"{statistics.mean(known):.3f}" if known else "-", *([f"{statistics.mean(right):.1%}"] if right else []),
        ]))  # fmt: skip
    head = [
        "method", "answer loss", "against full fine-tuning", "seeds", "rate", "1e9 operations a step",
        "CPU time, LoRA = 1", "peak over weights / checkpointed", "time / operations to LoRA's loss",
        "to full fine-tuning's", "loss of what it knew", *(["accuracy"] if rows and "accuracies" in rows[-1] else []),
    ]  # fmt: skip
    return markdown(head, [line for _, line in sorted(lines)])


def _effort(mine: Sequence[Row], full: Sequence[Row], peers: Sequence[Row], costs: dict[str, Row]) -> list[str]:
    """Return the cells of one trained contestant between its loss and what it knew."""
    name = mine[0]["contestant"]
    against = paired(mine, full) if name != FULL else None
    cost, peer = costs.get(name), costs.get(PEER)
    step = ["-", "-", "-"]
    if cost is not None:
        step = [
            f"{cost['operations'] / 1e9:.0f}", f"{cost['cpu_time_over_peer']:.2f}×",
            " / ".join(f"{cost[name] / 1e6:.0f} MB" for name in PEAKS if name in cost),
        ]  # fmt: skip
    spread = f" ± {against[1]:.1%}" if against is not None and len(mine) > 1 else ""
    return [
        "" if against is None else f"{against[0]:+.1%}{spread}", f"{len(mine)}", f"{mine[0]['lr']:g}", *step,
        _sooner(steps_to_quality(mine, peers), cost, peer),
        _sooner(steps_to_quality(mine, full), cost, costs.get(FULL)),
    ]  # fmt: skip


def _sooner(steps: float | None, cost: Row | None, peer: Row | None) -> str:
    """Return time and operations to a peer's last loss as shares of what the peer took: steps times a step's cost."""
    if steps is None:
        return "never"
    if cost is None or peer is None:
        return "-"
    time = steps * cost["cpu_time_over_peer"] / peer["cpu_time_over_peer"]
    return f"{time:.2f}× / {steps * cost['operations'] / peer['operations']:.2f}×"


def row_accuracy(row: Row) -> float:
    """Return the mean accuracy of a row's test sets."""
    return float(statistics.mean(row["accuracies"].values()))


def grid_table(rows: Sequence[Row], names: Sequence[str], grid_seed: int) -> str:
    """Return the Markdown table of everyone's best on the seed that the rates are chosen on, beside who is ahead."""
    best: dict[str, Row] = {}
    for row in rows:
        name = row["contestant"]
        if row["seed"] == grid_seed and name in names and name != BEFORE:
            best[name] = min(best.get(name, row), row, key=lambda each: each["answer_loss"])
    tried = {name: sum(row["contestant"] == name and row["seed"] == grid_seed for row in rows) for name in best}
    lines = [
        [
            name, f"{row['answer_loss']:.4f}", *(_beside(row, best.get(peer)) for peer in (FULL, PEER)),
            f"{row['lr']:g}", f"{tried[name]}",
        ]
        for name, row in sorted(best.items(), key=lambda item: item[1]["answer_loss"])
    ]  # fmt: skip
    head = ["method", "answer loss, grid's seed", "against full fine-tuning", "against LoRA", "rate", "rates tried"]
    return markdown(head, lines)


def _beside(row: Row, peer: Row | None) -> str:
    return "" if peer is None or peer is row else f"{row['answer_loss'] / peer['answer_loss'] - 1:+.1%}"


def task_table(task: str, names: Sequence[str], seeds: Sequence[int], size: Size) -> str:
    """Return the table of one task's recorded runs of one size."""
    return table(_alike(task, size), names, seeds, read_rows("pretrained_cost"))


def grid_of_task(task: str, names: Sequence[str], size: Size) -> str:
    """Return the same of the seed that rates are chosen on."""
    return grid_table(_alike(task, size), names, GRID_SEED)


def _alike(task: str, size: Size) -> list[Row]:
    return [row for row in read_rows("pretrained") if row["task"] == task and size.key().items() <= row.items()]


def tables(task: str, names: Sequence[str], seeds: Sequence[int], size: Size) -> dict[str, str]:
    """Return the tables of one task by the names of their places in bench/README.md, a pair for each way of packing."""
    made: dict[str, str] = {}
    for packed, name in ((FIRST_FIT, f"pretrained {task}"), (FULL_ROWS, f"pretrained {task}, full rows")):
        of_these = replace(size, packed=packed)
        made[name] = task_table(task, names, seeds, of_these)
        made[f"{name} grid"] = grid_of_task(task, names, of_these)
    return made


def report(task: str, names: Sequence[str], seeds: Sequence[int], size: Size) -> None:
    """Print the tables of one task and put them between the markers of bench/README.md, if they are there."""
    for name, text in tables(task, names, seeds, size).items():
        print(text)
        put(name, text)
