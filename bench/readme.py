"""The tables of README.md that come from recorded rows: `python -m bench.readme` writes them all anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.optimizer_table import size_name
from bench.rows import read_rows

README = Path(__file__).parents[1] / "README.md"
SIZES = (1 << 24, 1 << 26)
SMALL = (10_000 * 1_024, 10_000)


def put(name: str, text: str, readme: Path = README) -> bool:
    """Replace what stands between the markers of table `name`; returns whether they are there."""
    begin, end = f"<!-- {name} table: written by bench -->", f"<!-- end of {name} table -->"
    page = readme.read_text() if readme.exists() else ""
    if begin not in page or end not in page:
        return False
    before, rest = page.split(begin, 1)
    readme.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}")
    return True


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def _latest(rows: list[dict[str, Any]], **wanted: object) -> dict[str, Any] | None:
    found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    return found[-1] if found else None


def _cell(row: dict[str, Any] | None, unit: str) -> str:
    if row is None:
        return "-"
    if row["p50_ms"] is None:
        return str(row["reason"])
    value = row["ns_per_element"] if unit == "ns" else row["p50_ms"]
    ratio = row["ratio_to_torch_fused_fp32"]
    return f"{value:.3g} ({ratio:.2f}×)" if ratio is not None else f"{value:.3g}"


def optimizer_table(rows: list[dict[str, Any]]) -> str:
    """Return the newest CPU rows of each optimizer: nanoseconds per element, and beside torch's fused AdamW in fp32."""
    here = [row for row in rows if row["ran_on"] == "cpu"]
    names = dict.fromkeys((row["name"], row["dtype"]) for row in here)
    lines = []
    for name, dtype in names:
        mine = [row for row in here if (row["name"], row["dtype"]) == (name, dtype)]
        states = [
            row["state_bytes_per_element"] for row in mine if row["state_bytes_per_element"] and row["tensors"] == 1
        ]
        cells = [_cell(_latest(mine, elements=size, tensors=1), "ns") for size in SIZES]
        small = _cell(_latest(mine, elements=SMALL[0], tensors=SMALL[1]), "ms")
        lines.append([name, dtype, *cells, small, f"{states[-1]:.2f}" if states else "-"])
    sizes = [f"{size_name(size)}, ns per element" for size in SIZES]
    return markdown(["optimizer", "weights", *sizes, "10,000 × 1,024, ms", "state, B per element"], lines)


TABLES: dict[str, Callable[[list[dict[str, Any]]], str]] = {"optimizer": optimizer_table}


def main() -> None:
    """Write every table whose rows and markers exist."""
    for name, table in TABLES.items():
        rows = read_rows(name)
        if rows and put(name, table(rows)):
            print(f"{name}: written")


if __name__ == "__main__":
    main()
