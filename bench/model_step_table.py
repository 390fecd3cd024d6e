"""The table of a given model's steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from bench.command import table_console
from bench.optimizer_table import short
from bench.step_table import mebibytes

if TYPE_CHECKING:
    from bench.model_step import ModelRow

COLUMNS = (
    "name", "step\nms", "p20-p80\nms", "forward", "again", "backward", "optimizer", "switch", "host", "tokens/s",
    "× peft\nLoRA", "launches", "waits,\nmallocs", "operations\n(plan)", "peak MiB\n(plan)",
)  # fmt: skip


def cells(row: ModelRow, machines: Sequence[str]) -> list[str]:
    """Return the row as text, with what was predicted by each machine; why in the last column where it has no times."""
    predicted = [
        "-".join(short(end) for end in row.predicted[name]["step_ms"]) if name in row.predicted else "-"
        for name in machines
    ]
    plan = [_pair(row.operations, row.planned_operations), f"{mebibytes(row.peak_bytes)} ({_mib(row.planned_bytes)})"]
    if row.step_ms is None:
        return [row.name, *["-"] * (len(COLUMNS) - 3), *plan, *predicted, row.reason or ""]
    parts = (row.forward_ms, row.recomputation_ms, row.backward_ms, row.optimizer_ms, row.switch_ms, row.host_ms)
    return [
        row.name,
        short(row.step_ms),
        f"{short(row.step_ms_low)}-{short(row.step_ms_high)}",
        *(short(part) for part in parts),
        short(row.tokens_per_s),
        "-" if row.ratio_to_peft_lora is None else f"{row.ratio_to_peft_lora:.2f}",
        "-" if row.launches is None else f"{row.launches:,}",
        "-" if row.waits is None else f"{row.waits}, {row.allocations}",
        *plan,
        *predicted,
        "",
    ]


def _pair(found: int | None, planned: int | None) -> str:
    return f"{'-' if found is None else f'{found:,}'} ({'-' if planned is None else f'{planned:,}'})"


def _mib(planned: int | None) -> str:
    return mebibytes(planned)


def print_rows(rows: Sequence[ModelRow], console: Console | None = None) -> None:
    """Print the rows of one model."""
    first, counts = rows[0], sorted({row.recomputed_blocks for row in rows})
    blocks = f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} blocks recomputed"
    blocks = blocks if counts[-1] else "nothing recomputed"
    machines = list(dict.fromkeys(name for row in rows for name in row.predicted))
    table = Table(
        title=f"{first.model}, {first.batch} × {first.seq_len} tokens, {first.dtype}, {first.device}, {blocks}",
        box=box.SIMPLE_HEAD,
    )
    for name in (*COLUMNS, *(f"predicted, ms\n{name}" for name in machines), "why none"):
        words = name in (COLUMNS[0], "why none")
        table.add_column(name, justify="left" if words else "right", no_wrap=name != "why none")
    for row in rows:
        table.add_row(*cells(row, machines))
    (console or table_console()).print(table, highlight=False)
