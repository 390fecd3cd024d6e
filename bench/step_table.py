"""The table of the step benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from bench.command import table_console
from bench.optimizer_table import short
from bench.step_runs import Row

COLUMNS = (
    "method", "step\nms", "p20-p80 ms", "forward\nms", "backward\nms", "optimizer\nms", "refresh\nms", "tokens/s",
    "× peft\nLoRA", "× full", "saved\nMiB", "kept\nMiB", "peak\nMiB", "lowest layer\n(expected)",
    "rounds, or why none",
)  # fmt: skip


def mebibytes(count: float | None) -> str:
    """Return three digits of a number of bytes in MiB."""
    return "-" if count is None else short(count / 2**20)


def cells(row: Row) -> list[str]:
    """Return the row as text: dashes where there are no numbers, and why in the last column."""
    if row.step_ms is None:
        return [row.method, *["-"] * (len(COLUMNS) - 2), row.reason or ""]
    lowest = "-"
    if row.lowest_layer is not None and row.expected_lowest_layer is not None:
        lowest = f"{row.lowest_layer:.2f} ({row.expected_lowest_layer:.2f})"
    return [
        row.method,
        short(row.step_ms),
        f"{short(row.p20_ms)}-{short(row.p80_ms)}",
        short(row.forward_ms),
        short(row.backward_ms),
        short(row.optimizer_ms),
        short(row.refresh_ms),
        short(row.tokens_per_s),
        *("-" if ratio is None else f"{ratio:.2f}" for ratio in (row.ratio_to_peft_lora, row.ratio_to_full)),
        mebibytes(row.saved_bytes),
        mebibytes(row.state_bytes),
        mebibytes(row.peak_bytes),
        lowest,
        str(row.rounds),
    ]


def print_rows(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the rows of one case."""
    first = rows[0]
    title = f"training step, {first.geometry}, {first.batch} × {first.seq_len} tokens, {first.dtype}, {first.device}"
    table = Table(title=f"{title}\n{first.settings}", box=box.SIMPLE_HEAD)
    for name in COLUMNS:
        words = name in (COLUMNS[0], COLUMNS[-1])
        table.add_column(name, justify="left" if words else "right", no_wrap=name != COLUMNS[-1])
    for row in rows:
        table.add_row(*cells(row))
    (console or table_console()).print(table, highlight=False)
