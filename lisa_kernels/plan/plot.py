"""A plan as a picture: what is alive over the run, by category."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from lisa_kernels.plan.result import Plan
from lisa_kernels.plan.trace import CATEGORIES, Trace
from lisa_kernels.scores.report import new_figure, save_figure
from lisa_kernels.sizes import gb

MOST_POINTS = 2000


def stacked(trace: Trace, most_points: int = MOST_POINTS) -> tuple[list[int], list[list[int]]]:
    """Return (numbers of events, the bytes alive after each, by category in the order of `CATEGORIES`).

    Of more than `most_points` events each stretch of equal length is shown by the one after which most is alive.
    """
    step = max(1, -(-len(trace.events) // most_points))
    alive = dict.fromkeys(CATEGORIES, 0)
    shown: list[int] = []
    columns: list[list[int]] = []
    for index, event in enumerate(trace.events):
        alive[event.category] += event.bytes
        if index % step == 0:
            shown.append(index)
            columns.append([])
        if not columns[-1] or sum(alive.values()) > sum(columns[-1]):
            shown[-1], columns[-1] = index, list(alive.values())
    return shown, [list(row) for row in zip(*columns)]


def plot_timeline(plan: Plan, path: Path) -> None:
    """Draw the bytes alive by category over the events of the run, its phases marked, into a file."""
    figure = new_figure(path, 10.0, 5.0)
    axes = figure.add_subplot()
    numbers, rows = stacked(plan.trace)
    used = [(category, row) for category, row in zip(CATEGORIES, rows) if any(row)]
    axes.stackplot(
        numbers, *([size / 1e9 for size in row] for _, row in used), labels=[name for name, _ in used], linewidth=0
    )
    begin, top = 0, plan.peak_bytes / 1e9
    axes.set_ylim(0.0, 1.35 * top)  # room for the names of phases
    for phase, events in groupby(plan.trace.events, key=lambda event: event.phase):
        end = begin + len(list(events))
        axes.axvline(begin, color="black", linewidth=0.4)
        if end - begin > len(plan.trace.events) / 80:
            axes.text((begin + end) / 2, 1.34 * top, phase, rotation=90, ha="center", va="top", fontsize="x-small")
        begin = end
    axes.plot([plan.trace.peak_index], [top], "kv", markersize=5)
    axes.set_title(f"{plan.workload.method.name} on {plan.workload.model}: {gb(plan.peak_bytes)} at the peak")
    axes.set_xlabel("storages made and freed")
    axes.set_ylabel("alive, GB")
    figure.legend(loc="outside right upper", fontsize="small", reverse=True)
    save_figure(figure, path)
