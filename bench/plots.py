"""Pictures of benchmark rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.errors import InputError

LINE_STYLES = {"fp32": "-", "bf16": "--"}


def check_picture(path: Path) -> None:
    """Raise InputError where no picture could be written to `path`, before anything is measured for it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("a plot needs matplotlib: install it, or leave the plot out.") from error
    formats = FigureCanvasAgg(Figure()).get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise InputError(f"{str(path)!r} names no picture format: end it in one of .{', .'.join(sorted(formats))}.")
    if not path.parent.is_dir():
        raise InputError(f"the folder of {str(path)!r} does not exist: create it, or name another file.")


def plot_sizes(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the nanoseconds per element over the size, a line for each optimizer and dtype; bars from p20 to p80."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    colours: dict[str, str] = {}
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["p50_ms"] is not None:
            lines.setdefault((row["optimizer"], row["dtype"]), []).append(row)
    for (optimizer, dtype), points in lines.items():
        colour = colours.setdefault(optimizer, f"C{len(colours)}")
        sizes = [row["elements"] for row in points]
        middle, low, high = (
            [row[f"{name}_ms"] * 1e6 / row["elements"] for row in points] for name in ("p50", "p20", "p80")
        )
        errors = [[m - x for m, x in zip(middle, low)], [x - m for m, x in zip(middle, high)]]
        axes.errorbar(
            sizes, middle, errors, color=colour, linestyle=LINE_STYLES[dtype], marker=".", capsize=2,
            label=f"{optimizer}, {dtype}",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("elements")
    axes.set_ylabel("optimizer.step(), ns per element")
    axes.grid(alpha=0.3)
    if lines:
        figure.legend(loc="outside right upper", fontsize="small")
    _save(figure, path)


PARTS = ("forward", "backward", "optimizer", "refresh")


def plot_parts(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw each method's step as a bar of its four parts, with a line from p20 to p80."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["step_ms"] is not None][::-1]
    figure = Figure(figsize=(10.0, 1.5 + 0.4 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    names, left = [row["method"] for row in shown], [0.0] * len(shown)
    for part in PARTS:
        widths = [row[f"{part}_ms"] for row in shown]
        axes.barh(names, widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths)]
    for index, row in enumerate(shown):
        axes.plot([row["p20_ms"], row["p80_ms"]], [index, index], color="black", linewidth=1.0)
    axes.set_xlabel("training step, ms")
    axes.grid(alpha=0.3, axis="x")
    if shown:
        figure.legend(loc="outside upper center", ncols=len(PARTS), fontsize="small")
    _save(figure, path)


STEP_PARTS = ("forward", "recomputation", "backward", "optimizer")


def plot_model_steps(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw each method's step by part, as measured, and above it in a lighter bar for each machine, as predicted."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [row for row in rows if row["step_ms"] is not None or row["predicted"]][::-1]
    machines = list(dict.fromkeys(name for row in shown for name in row["predicted"]))
    figure = Figure(figsize=(10.0, 1.5 + 0.3 * (1 + len(machines)) * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / (1 + len(machines))
    for index, row in enumerate(shown):
        bars: list[tuple[str, dict[str, float], list[float] | None]] = []
        if row["step_ms"] is not None:
            bars.append(("measured", {part: row[f"{part}_ms"] for part in STEP_PARTS}, None))
        for name, said in row["predicted"].items():
            bars.append((name, {part: sum(ends) / 2 for part, ends in said["parts_ms"].items()}, said["step_ms"]))
        for place, (name, parts, ends) in enumerate(bars):
            at, left = index + place * height, 0.0
            for number, part in enumerate(STEP_PARTS):
                width = parts.get(part, 0.0)
                alpha = 0.45 if ends else 1.0
                axes.barh(at, width, height, left, color=f"C{number}", alpha=alpha, align="edge")
                left += width
            if ends:
                axes.plot(ends, [at + height / 2] * 2, color="black", linewidth=1.0)
            axes.text(max(left, *(ends or [left])), at + height / 2, f" {name}", va="center", fontsize="x-small")
    axes.set_yticks([index + 0.4 for index in range(len(shown))], [row["name"] for row in shown])
    axes.margins(x=0.15)
    axes.set_xlabel("training step, ms; lighter: predicted, with its range")
    axes.grid(alpha=0.3, axis="x")
    handles = [Patch(color=f"C{number}") for number in range(len(STEP_PARTS))]
    figure.legend(handles, STEP_PARTS, loc="outside upper center", ncols=len(STEP_PARTS), fontsize="small")
    _save(figure, path)


def plot_card_steps(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw predicted steps by part, a panel for each card, a bar for each method, a line from good days to bad ones."""
    from matplotlib.figure import Figure

    latest = {(row["card"], row["name"]): row for row in rows}
    cards, names = (list(dict.fromkeys(key[place] for key in latest)) for place in (0, 1))
    figure = Figure(figsize=(4.2 * len(cards), 1.6 + 0.45 * len(names)), layout="constrained")
    parts = (*STEP_PARTS, "switch")
    for place, axes in enumerate(figure.subplots(1, len(cards), squeeze=False, sharey=True)[0]):
        mine = [latest[cards[place], name] for name in names[::-1] if (cards[place], name) in latest]
        left = [0.0] * len(mine)
        for part in parts:
            widths = [sum(row["parts"].get(part, (0.0, 0.0))) / 2 for row in mine]
            axes.barh([row["name"] for row in mine], widths, left=left, label=part if place == 0 else None)
            left = [start + width for start, width in zip(left, widths)]
        for index, row in enumerate(mine):
            axes.plot([row["step_seconds_low"], row["step_seconds_high"]], [index] * 2, color="black", linewidth=1.0)
        axes.set_title(f"{cards[place]}, predicted", fontsize="medium")
        axes.set_xlabel("a step, s")
        axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside upper center", ncols=len(parts), fontsize="small")
    _save(figure, path)


def plot_layers(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the backward of each form of each layer, in microseconds per token; a group of bars per case."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["backward_ms"] is not None]
    cases = list(dict.fromkeys((row["inputs"], row["outputs"], row["dtype"]) for row in shown))
    forms = list(dict.fromkeys(row["layer"] for row in shown))
    figure = Figure(figsize=(10.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for place, form in enumerate(forms):
        mine = [row for row in shown if row["layer"] == form]
        at = [cases.index((row["inputs"], row["outputs"], row["dtype"])) + place / (len(forms) + 1) for row in mine]
        heights = [row["backward_ms"] * 1e3 / row["tokens"] for row in mine]
        axes.bar(at, heights, 1 / (len(forms) + 1), label=form, align="edge")
    axes.set_xticks([place + 0.5 for place in range(len(cases))], [f"{n} → {m}, {dtype}" for n, m, dtype in cases])
    axes.set_yscale("log")
    axes.set_ylabel("backward, µs per token")
    axes.grid(alpha=0.3, axis="y")
    if shown:
        figure.legend(loc="outside right upper", fontsize="small")
    _save(figure, path)


def plot_memory(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw each method's planned peak as a bar of its parts, a panel for each model; peers' names end in a star."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["split"] is not None]
    models = list(dict.fromkeys(row["model"] for row in shown))
    most = max((sum(row["model"] == model for row in shown) for model in models), default=1)
    figure = Figure(figsize=(6.0 * max(1, len(models)), 1.5 + 0.35 * most), layout="constrained")
    for place, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), place + 1)
        mine = sorted((row for row in shown if row["model"] == model), key=lambda row: -row["planned_bytes"])
        names, left = [row["method"] + (" *" if row["peer"] else "") for row in mine], [0.0] * len(mine)
        for part in parts_of(mine[0]["split"]):
            widths = [parts_of(row["split"])[part] / 1e9 for row in mine]
            axes.barh(names, widths, left=left, label=part if place == 0 else None)
            left = [start + width for start, width in zip(left, widths)]
        axes.set_title(f"{model}, {mine[0]['batch']} × {mine[0]['seq_len']} tokens", fontsize="medium")
        axes.set_xlabel("planned peak, GB (1e9 bytes); * another package")
        axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside upper center", ncols=5, fontsize="small")
    _save(figure, path)


def parts_of(split: dict[str, int]) -> dict[str, int]:
    """Return the bytes at a peak by the parts that tables and pictures show."""
    groups = {
        "weights": ("weights",), "gradients": ("gradients",), "state and bases": ("optimizer state", "bases", "pages"),
        "activations and loss": ("saved activations", "loss"), "temporaries": ("temporaries",),
    }  # fmt: skip
    return {name: sum(split[category] for category in group) for name, group in groups.items()}


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"the plot could not be written to {str(path)!r} ({error.strerror}).") from error


def plot_digits(rows: Mapping[str, Tensor], path: Path) -> None:
    """Draw images [n, height, width] from −1 to 1, a row for each name."""
    from matplotlib.figure import Figure

    most = max(len(images) for images in rows.values())
    figure = Figure(figsize=(0.45 * most + 3.5, 0.55 * len(rows)), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items()):
        padded = torch.nn.functional.pad(images, (0, 1), value=-1.0)
        axes.imshow(torch.cat(list(padded), dim=1).numpy(), cmap="gray", vmin=-1, vmax=1)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=100, bbox_inches="tight")
