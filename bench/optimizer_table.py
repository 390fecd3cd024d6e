"""The table of one case of the optimizer benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from bench.command import table_console
from bench.optimizer_cases import Row

COLUMNS = (
    "optimizer", "dtype", "p50 ms", "p20-p80 ms", "ns/\nelement", "bytes/\nelement", "GB/s", "share\nof copy",
    "× torch\nfused fp32", "state B/\nelement", "extra\nMiB", "rounds, or why none",
)  # fmt: skip


def size_name(elements: int) -> str:
    """Return `2^20` for powers of two and the number for others."""
    return f"2^{elements.bit_length() - 1}" if elements & (elements - 1) == 0 else f"{elements:,}"


def short(number: float | None) -> str:
    """Return three digits, and more only of whole numbers."""
    if number is None:
        return "-"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def cells(row: Row) -> list[str]:
    """Return the row as text: dashes where there are no numbers, and why in the last column."""
    if row.p50_ms is None:
        return [row.optimizer, row.dtype, *["-"] * (len(COLUMNS) - 3), row.reason or ""]
    ratio = row.ratio_to_torch_fused_fp32
    return [
        row.optimizer,
        row.dtype,
        short(row.p50_ms),
        f"{short(row.p20_ms)}-{short(row.p80_ms)}",
        short(row.ns_per_element),
        f"{row.moved_bytes_per_element:.2f}",
        f"{row.gb_s:.1f}",
        f"{row.copy_share:.2f}",
        "-" if ratio is None else f"{ratio:.2f}",
        f"{row.state_bytes_per_element:.3f}",
        f"{(row.extra_bytes or 0) / 2**20:.2f}",
        str(row.rounds),
    ]


def print_rows(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the rows of one case."""
    first = rows[0]
    what = size_name(first.elements)
    if first.tensors > 1:
        what = f"{first.tensors:,} tensors of {size_name(first.elements // first.tensors)}"
    copy = next((f", copy {row.copy_gb_s:.1f} GB/s" for row in rows if row.copy_gb_s is not None), "")
    table = Table(title=f"optimizer.step() of {what} elements on {first.device}{copy}", box=box.SIMPLE_HEAD)
    for name in COLUMNS:
        words = name in (*COLUMNS[:2], COLUMNS[-1])
        table.add_column(name, justify="left" if words else "right", no_wrap=name != COLUMNS[-1])
    for row in rows:
        table.add_row(*cells(row))
    (console or table_console()).print(table, highlight=False)
