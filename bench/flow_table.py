"""The tables of `bench/results/flow.jsonl` and `flow_memory.jsonl`, printed and written into bench/README.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.flow_arms import ARMS, GROUPS, LAYERS, Arm
from bench.readme import README, markdown, put
from bench.rows import read_rows

Row = dict[str, Any]
REAL = {"digits": "real digits", "fashion-mnist": "real garments"}
FILES = {"digits": "flow", "fashion-mnist": "flow_fashion"}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return mean ± standard deviation; the value alone where there is one, "-" where there is none."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def rows_of(rows: list[Row], arm: Arm, budget: str) -> list[Row]:
    """Return the newest row of each seed of an arm's budget, in the order of seeds."""
    mine = {row["seed"]: row for row in rows if row["arm"] == arm.name and budget in row.get("budgets", ())}
    return [mine[seed] for seed in sorted(mine)]


def flow_table(rows: list[Row]) -> str:
    """Return quality under both budgets and cost: a line for each arm, real pictures last."""
    lines = []
    for arm in ARMS:
        equal_steps, passes = (rows_of(rows, arm, budget) for budget in ("steps", "passes"))
        costs = [row for row in rows if row["arm"] == arm.name and row.get("cost")]
        if not passes and not equal_steps:
            continue
        cells = [spread([row["loss"] for row in equal_steps])]
        cells += [spread([row[name] for row in passes if name in row], digits) for name, digits in QUALITY.items()]
        lines.append([arm.name, *cells, *(_cost(costs[-1]) if costs else ["-"] * 6)])
    real = [row for row in rows if row["arm"] in REAL.values()]
    if real:
        cells = [spread([real[-1][name]], digits) if name in real[-1] else "-" for name, digits in QUALITY.items()]
        lines.append([real[-1]["arm"], "-", *cells, *["-"] * 6])
    head = [
        "arm", "loss, equal steps", "loss, equal layer passes", "accuracy", "Fréchet", "kernel", "nearest",
        "layers run", "ms an image, 1", "256", "saved, MB", "gradients, MB", "moments, MB",
    ]  # fmt: skip
    return markdown(head, lines)


QUALITY = {"loss": 3, "accuracy": 3, "frechet": 2, "kernel": 2, "nearest": 2}


def _cost(row: Row) -> list[str]:
    held = [f"{row[name] / 1e6:.2f}" for name in ("saved_bytes", "gradient_bytes", "moment_bytes")]
    times = [f"{row[f'ms_per_image_batch_{batch}']:.1f}" for batch in (1, 256)]
    return [str(row["layers_per_evaluation"]), *times, *held]


def differences_table(rows: list[Row]) -> str:
    """Return how an arm differs from another on the same seeds: mean ± standard deviation, below 0 is better."""
    lines = []
    for one, other in COMPARED:
        cells = []
        for budget, name, digits in (("steps", "loss", 3), ("passes", "loss", 3), ("passes", "frechet", 2)):
            pair = [{row["seed"]: row[name] for row in rows_of(rows, arm, budget)} for arm in (one, other)]
            apart = [pair[0][seed] - pair[1][seed] for seed in pair[0] if seed in pair[1]]
            cells.append(spread(apart, digits))
        if any(cell != "-" for cell in cells):
            lines.append([one.name, other.name, *cells])
    return markdown(["arm", "less", "loss, equal steps", "loss, equal layer passes", "Fréchet"], lines)


def _compared() -> list[tuple[Arm, Arm]]:
    """Return the pairs that answer a question each."""
    letters: dict[tuple[str, int], Arm] = {}
    for arm in ARMS:
        groups = arm.groups if arm.groups > 1 else arm.layers
        letters[arm.name[0], groups] = arm
    dense, dense_twin = ARMS[0], ARMS[-1]
    pairs = []
    for groups in GROUPS:
        experts, extended = letters["C", groups], letters["E", groups]
        pairs += [(letters["G", groups], letters["B", LAYERS // groups]), (letters["G", groups], letters["F", groups])]
        pairs += [(experts, letters["B", LAYERS // groups]), (experts, letters["F", groups]), (experts, dense)]
        pairs += [(letters["D", groups], experts), (extended, experts), (extended, dense_twin)]
    return pairs


COMPARED = _compared()


def times_table(rows: list[Row]) -> str:
    """Return the loss in each twelfth of time under equal layer passes, the noisiest first."""
    lines = []
    for arm in ARMS:
        mine = rows_of(rows, arm, "passes")
        if mine:
            parts = zip(*(row["losses"] for row in mine))
            lines.append([arm.name, *(f"{statistics.mean(part):.3f}" for part in parts)])
    return markdown(["arm", *(f"{part}/12" for part in range(12))], lines)


def seams_table(rows: list[Row]) -> str:
    """Return how far apart the velocities of two groups are at each boundary between them, under both budgets."""
    lines = []
    for arm in ARMS:
        for budget in ("steps", "passes"):
            mine = rows_of(rows, arm, budget)
            if arm.groups > 1 and mine:
                parts = [spread(part, 2) for part in zip(*(row["seams"] for row in mine))]
                lines.append([arm.name, f"equal {BUDGETS[budget]}", *parts, *["-"] * (3 - len(parts))])
    return markdown(["arm", "budget", "first boundary", "second", "third"], lines)


BUDGETS = {"steps": "steps", "passes": "layer passes"}


def memory_table(rows: list[Row]) -> str:
    """Return the newest plan of each run: the peak in GB (1e9 bytes), and the most of each category."""
    latest = {row["run"]: row for row in rows}
    if not latest:
        return markdown(MEMORY_HEAD, [])
    dense = next(iter(latest.values()))
    lines = []
    for name, row in latest.items():
        parts = [f"{row['most_bytes'][part] / 1e9:.2f}" for part in MOST]
        ratio = row["training_bytes"] / dense["training_bytes"]
        lines.append([name, f"{row['peak_bytes'] / 1e9:.2f}", *parts, f"{ratio:.2f}×"])
    return markdown(MEMORY_HEAD, lines)


MOST = ("weights", "gradients", "moments", "saved activations")
MEMORY_HEAD = ["run", "peak, GB", *(f"most {part}" for part in MOST), "peak without weights, beside dense"]


def runs_table(rows: list[Row]) -> str:
    """Return what runs of the command draw: the newest row of each run, text and guidance."""
    latest = {(row["run"], row["steps"], row["told"], row["guidance"]): row for row in rows}
    lines = []
    for row in latest.values():
        losses = f"{row['eval_loss_before']:.3f} to {row['eval_loss_after']:.3f}"
        guidance = "-" if row["guidance"] is None else f"{row['guidance']:g}"
        lines.append([row["run"], str(row["steps"]), losses, row["told"], guidance, f"{row['recognised']:.3f}"])
    return markdown(["run", "steps", "held-out loss", "told", "guidance", "recognised as asked"], lines)


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "flow": ("flow", flow_table), "flow differences": ("flow", differences_table),
    "flow fashion": ("flow_fashion", flow_table), "flow fashion differences": ("flow_fashion", differences_table),
    "flow by time": ("flow", times_table), "flow seams": ("flow", seams_table),
    "flow runs": ("flow_runs", runs_table), "flow memory": ("flow_memory", memory_table),
}  # fmt: skip


def report(names: Sequence[str] = tuple(TABLES), readme: Path = README) -> None:
    """Print tables and put them between their markers in bench/README.md, if they are there."""
    for name in names:
        rows, table = TABLES[name]
        text = table(read_rows(rows))
        print(text)
        put(name, text, readme)
