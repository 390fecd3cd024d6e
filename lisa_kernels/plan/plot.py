"""A plan as a picture: what is alive over the run, by category, and what crosses between host and device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lisa_kernels.plan.moves import CODES_IN, MASTERS_IN, MASTERS_OUT, Move
from lisa_kernels.plan.result import Plan
from lisa_kernels.plan.trace import CATEGORIES, Trace
from lisa_kernels.scores.report import new_figure, save_figure
from lisa_kernels.sizes import gb

MOST_POINTS = 2000
# Stretches of a run in which what crosses over is summed up.
BUCKETS = 200
# None of those in which categories are drawn.
COLOURS = {CODES_IN: "tab:olive", MASTERS_IN: "tab:cyan", MASTERS_OUT: "black"}


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


def crossings(moves: Sequence[Move], events: int, buckets: int = BUCKETS) -> dict[str, list[int]]:
    """Return the bytes that cross over in each of so many stretches of equal length, by kind; out is below zero."""
    found: dict[str, list[int]] = {}
    for move in moves:
        row = found.setdefault(move.kind, [0] * buckets)
        row[min(move.event * buckets // max(1, events), buckets - 1)] += _signed(move)
    return found


def _signed(move: Move) -> int:
    return -move.bytes if move.kind == MASTERS_OUT else move.bytes


def plot_timeline(plan: Plan, path: Path, moves: Sequence[Move] = ()) -> None:
    """Draw the bytes alive by category over the events of the run, its phases marked, into a file.

    moves: what crosses between host and device meanwhile, which is drawn below.
    """
    figure = new_figure(path, 10.0, 6.5 if moves else 5.0)
    axes, below = figure.add_subplot(), None
    if moves:
        axes.remove()
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    numbers, rows = stacked(plan.trace)
    used = [(category, row) for category, row in zip(CATEGORIES, rows) if any(row)]
    axes.stackplot(
        numbers, *([size / 1e9 for size in row] for _, row in used), labels=[name for name, _ in used], linewidth=0
    )
    begin, top = 0, plan.peak_bytes / 1e9
    axes.set_ylim(0.0, 1.35 * top)  # room for the names of phases
    for phase, events in groupby(plan.trace.events, key=lambda event: event.phase):
        end = begin + len(list(events))
        for each in (axes, *([] if below is None else [below])):
            each.axvline(begin, color="black", linewidth=0.4)
        if end - begin > len(plan.trace.events) / 80:
            axes.text((begin + end) / 2, 1.34 * top, phase, rotation=90, ha="center", va="top", fontsize="x-small")
        begin = end
    axes.plot([plan.trace.peak_index], [top], "kv", markersize=5)
    axes.set_title(f"{plan.workload.method.name} on {plan.workload.model}: {gb(plan.peak_bytes)} at the peak")
    axes.set_ylabel("alive, GB")
    if below is not None:
        _plot_crossings(below, moves, len(plan.trace.events))
    (below or axes).set_xlabel("storages made and freed")
    figure.legend(loc="outside right upper", fontsize="small", reverse=True)
    save_figure(figure, path)


def _plot_crossings(axes: Any, moves: Sequence[Move], events: int) -> None:
    """Draw what crosses over in stretches of the run, in above zero and out below."""
    width, above = events / BUCKETS, [0.0] * BUCKETS
    places = [(number + 0.5) * width for number in range(BUCKETS)]
    for kind, row in crossings(moves, events).items():
        heights = [size / 1e9 for size in row]
        under = above if kind != MASTERS_OUT else [0.0] * BUCKETS
        axes.bar(places, heights, width, bottom=under, label=kind, color=COLOURS[kind])
        if kind != MASTERS_OUT:
            above = [low + height for low, height in zip(above, heights)]
    axes.axhline(0.0, color="black", linewidth=0.4)
    axes.set_ylabel("crossing, GB")
    total = sum(move.bytes for move in moves) / 1e9
    axes.set_title(f"between host and device: {total:.1f} GB in all", fontsize="small")
