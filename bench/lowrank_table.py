"""The two tables of the layer benchmark: layers, and updates."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from bench.command import table_console
from bench.lowrank_layers import LayerRow
from bench.lowrank_updates import UpdateRow
from bench.optimizer_table import short

LAYER_COLUMNS = (
    "layer", "tokens", "forward\nms", "backward\nms", "p20-p80 ms", "saved\nKiB", "backward ×\nours frozen",
    "backward ×\nnn.Linear frozen", "saved ×\nnn.Linear trained", "rounds, or why none",
)  # fmt: skip
UPDATE_COLUMNS = (
    "update", "optimizer\nms", "p20-p80 ms", "refresh\nms", "update\nms", "×\ngalore-torch", "rounds, or why none",
)  # fmt: skip


def _ratio(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"


def layer_cells(row: LayerRow) -> list[str]:
    """Return the row as text: dashes where there are no numbers, and why in the last column."""
    if row.backward_ms is None:
        return [row.layer, *["-"] * (len(LAYER_COLUMNS) - 2), row.reason or ""]
    ratios = (row.backward_ratio_to_frozen, row.backward_ratio_to_torch_frozen, row.saved_ratio_to_torch_trained)
    return [
        row.layer,
        str(row.tokens),
        short(row.forward_ms),
        short(row.backward_ms),
        f"{short(row.backward_p20_ms)}-{short(row.backward_p80_ms)}",
        short((row.saved_bytes or 0) / 1024),
        *map(_ratio, ratios),
        str(row.rounds),
    ]


def update_cells(row: UpdateRow) -> list[str]:
    """Return the row as text: dashes where there are no numbers, and why in the last column."""
    if row.update_ms is None:
        return [row.update, *["-"] * (len(UPDATE_COLUMNS) - 2), row.reason or ""]
    return [
        row.update,
        short(row.optimizer_ms),
        f"{short(row.optimizer_p20_ms)}-{short(row.optimizer_p80_ms)}",
        short(row.refresh_ms),
        short(row.update_ms),
        _ratio(row.ratio_to_galore_torch),
        str(row.rounds),
    ]


def print_rows(layers: Sequence[LayerRow], updates: Sequence[UpdateRow], console: Console | None = None) -> None:
    """Print the rows of one case as two tables."""
    first = layers[0]
    what = f"{first.inputs} → {first.outputs}, {first.dtype}, {first.device}"
    console = console or table_console()
    _print(console, f"linear layer {what}, {first.settings}", LAYER_COLUMNS, [layer_cells(row) for row in layers])
    _print(console, f"update of {what}, {updates[0].settings}", UPDATE_COLUMNS, [update_cells(row) for row in updates])


def _print(console: Console, title: str, columns: Sequence[str], lines: Sequence[list[str]]) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify="left" if name in (columns[0], columns[-1]) else "right")
    for line in lines:
        table.add_row(*line)
    console.print(table, highlight=False)
