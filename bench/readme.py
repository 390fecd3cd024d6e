"""The tables of bench/README.md that come from recorded rows: `python -m bench.readme` writes them all anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.optimizer_table import size_name
from bench.rows import read_rows

README = Path(__file__).with_name("README.md")
SIZES = (1 << 20, 1 << 24, 1 << 26)
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
    names = dict.fromkeys((row["optimizer"], row["dtype"]) for row in here)
    lines = []
    for name, dtype in names:
        mine = [row for row in here if (row["optimizer"], row["dtype"]) == (name, dtype)]
        states = [
            row["state_bytes_per_element"] for row in mine if row["state_bytes_per_element"] and row["tensors"] == 1
        ]
        cells = [_cell(_latest(mine, elements=size, tensors=1), "ns") for size in SIZES]
        small = _cell(_latest(mine, elements=SMALL[0], tensors=SMALL[1]), "ms")
        lines.append([name, dtype, *cells, small, f"{states[-1]:.2f}" if states else "-"])
    sizes = [f"{size_name(size)}, ns per element" for size in SIZES]
    return markdown(["optimizer", "weights", *sizes, "10,000 × 1,024, ms", "state, B per element"], lines)


SHOWN_KERNELS = {
    "adamw8/one/bf16-bf16": "step, bf16", "adamw8/one/fp32-fp32": "step, fp32",
    "adamw8/many/bf16-bf16": "step on many tensors, bf16", "adamw32/bf16-bf16": "step on 32-bit moments, bf16",
    "grad_norm/bf16": "gradients' norm, bf16", "fold/bf16": "fold, bf16",
}  # fmt: skip
SHOWN_TARGETS = {"sm_80": "A100", "sm_86": "RTX 3090", "sm_89": "RTX 4090", "sm_90": "H100"}


def _floor(row: dict[str, Any] | None, gpu: str) -> str:
    if row is None or gpu not in row["floors"]:
        return "-"
    low, high, limit = row["floors"][gpu]
    return f"{low:.1f}-{high:.1f} ({limit})"


def kernels_table(rows: list[dict[str, Any]]) -> str:
    """Return the main kernels: what sm_90 needs, and the floors of four GPUs in milliseconds per 10⁹ elements."""
    lines = []
    for kernel, title in SHOWN_KERNELS.items():
        mine = {row["target"]: row for row in rows if row["kernel"] == kernel}
        if "sm_90" not in mine:
            continue
        here = mine["sm_90"]
        instructions = here["instructions_per_element"]
        shown = "a loop" if instructions is None else f"{instructions:g}"
        counts = [f"{here['bytes_per_element']:g}", shown, str(here["registers"])]
        floors = [_floor(mine.get(target), gpu) for target, gpu in SHOWN_TARGETS.items()]
        lines.append([title, *counts, *floors])
    head = ["kernel", "B per element", "instructions per element, sm_90", "registers"]
    return markdown([*head, *(f"{gpu}, ms per 10⁹" for gpu in SHOWN_TARGETS.values())], lines)


def _numbers(problem: dict[str, Any] | None) -> str:
    return "-" if problem is None else f"{problem['nmse']:.1e} · {problem['worst_update']:,.3g}"


SHOWN_STATES = (
    "AdamW8bit, the whole optimizer", "E4M3 / E5M3, nearest", "bitsandbytes map, nearest",
    "bitsandbytes AdamW8bit, the whole optimizer on CPU", "FlashOptim, nearest, blocks of 32",
    "FlashOptim, floor, stochastic, blocks of 32", "floats of 4, 3, 2 mantissa bits",
)  # fmt: skip
SHOWN_PROBLEMS = {
    "1 decades": "1 decade", "3 decades": "3 decades", "5 decades": "5 decades", "attention": "attention",
    "MLP down": "MLP down", "embedding": "embedding", "head": "head",
}  # fmt: skip


def numerics_table(rows: list[dict[str, Any]]) -> str:
    """Return each format's error of the total update and its largest single update, on every problem."""
    latest = {row["codec"]: row for row in rows}
    lines = []
    for name in SHOWN_STATES:
        if name in latest:
            row = latest[name]
            cells = (_numbers(row["problems"].get(problem)) for problem in SHOWN_PROBLEMS)
            lines.append([name, f"{row['bytes_per_parameter']:.2f}", *cells])
    return markdown(["state", "B per element", *SHOWN_PROBLEMS.values()], lines)


CASE = ("geometry", "batch", "seq_len", "dtype", "settings")


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f}"


def step_table(rows: list[dict[str, Any]]) -> str:
    """Return the newest CPU rows of each method for the case that was measured last: seconds, ratios and bytes."""
    here = [row for row in rows if row["ran_on"] == "cpu"]
    here = [row for row in here if all(row[name] == here[-1][name] for name in CASE)]
    lines = []
    for name in dict.fromkeys(row["name"] for row in here):
        row = [row for row in here if row["name"] == name][-1]
        if row["step_ms"] is None:
            lines.append([row["method"], str(row["reason"]), *["-"] * 10])
            continue
        parts = [f"{row[f'{part}_ms'] / 1e3:.2f}" for part in ("step", "forward", "backward", "optimizer")]
        ratios = [row["ratio_to_peft_lora"], row["ratio_to_full"]]
        lines.append(
            [row["method"], *parts, f"{row['refresh_ms'] / 1e3:.3f}"]
            + ["-" if ratio is None else f"{ratio:.2f}×" for ratio in ratios]
            + [_mebibytes(row[f"{kind}_bytes"]) for kind in ("saved", "state", "peak")]
            + [_clock(row)]
        )
    head = ["method", "step, s", "forward", "backward", "optimizer", "refresh", "beside peft LoRA", "beside full"]
    return markdown([*head, "saved, MiB", "kept, MiB", "peak, MiB", "clock"], lines)


def _clock(row: dict[str, Any]) -> str:
    """Return by which clock a step was timed; of the process's own, what the one on the wall says beside LoRA's."""
    if row.get("clock", "wall") == "wall":
        return "wall"
    ratio = row["wall_ratio_to_peft_lora"]
    return "process" if ratio is None else f"process (wall: {ratio:.2f}×)"


def _by_shape(rows: list[dict[str, Any]], title: str, cell: Callable[[dict[str, Any]], str]) -> str:
    """Return a line for each form and dtype, a column for each shape, from the newest rows."""
    shapes = sorted({(row["inputs"], row["outputs"]) for row in rows})
    forms = list(dict.fromkeys((row["dtype"], row["name"]) for row in rows))
    lines = []
    for dtype, name in forms:
        found = [_latest(rows, dtype=dtype, name=name, inputs=n, outputs=m) for n, m in shapes]
        any_row = next(row for row in found if row is not None)
        cells = ["-" if row is None else cell(row) if row["reason"] is None else str(row["reason"]) for row in found]
        lines.append([any_row[title], dtype, *cells])
    return markdown([title, "dtype", *(f"{n} → {m}" for n, m in shapes)], lines)


def lowrank_table(rows: list[dict[str, Any]]) -> str:
    """Return microseconds per token of each layer's backward on CPUs, beside our frozen layer, and its saved bytes."""

    def cell(row: dict[str, Any]) -> str:
        per_token = row["backward_ms"] * 1e3 / row["tokens"]
        ratio, saved = row["backward_ratio_to_frozen"], row["saved_bytes"] / row["tokens"]
        beside = "" if ratio is None else f" ({ratio:.3g}×)"
        return f"{per_token:,.3g} µs{beside}, {saved:,.0f} B"

    return _by_shape([row for row in rows if row["ran_on"] == "cpu" and row["part"] == "layer"], "layer", cell)


def update_table(rows: list[dict[str, Any]]) -> str:
    """Return milliseconds of one matrix's update on CPUs, the refresh spread over its gap, beside galore-torch's."""

    def cell(row: dict[str, Any]) -> str:
        ratio = row["ratio_to_galore_torch"]
        return f"{row['update_ms']:,.3g} ms" + ("" if ratio is None else f" ({ratio:.3g}×)")

    return _by_shape([row for row in rows if row["ran_on"] == "cpu" and row["part"] == "update"], "update", cell)


SETTING = ("batch", "seq_len", "gradient_checkpointing")


def memory_table(rows: list[dict[str, Any]]) -> str:
    """Return the planned peaks of each method in GB (1e9 bytes), a column for each model; measured models' last."""
    models = sorted(
        dict.fromkeys(row["model"] for row in rows),
        key=lambda model: any(row["model"] == model and row["measured_bytes"] for row in rows),
    )
    rows = [row for row in rows if all(row[name] == rows[-1][name] for name in SETTING)]
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = []
        for model in models:
            row = _latest(rows, name=name, model=model)
            cells.append(_peak(row))
        title = next(row["method"] for row in rows if row["name"] == name)
        lines.append([title, *cells])
    return markdown(["method", *models], lines)


def _peak(row: dict[str, Any] | None) -> str:
    if row is None or row["planned_bytes"] is None:
        return "-" if row is None else str(row["reason"])
    if row["measured_bytes"] is None:
        return f"{row['planned_bytes'] / 1e9:.2f} GB"
    return f"{row['planned_bytes'] / 1e6:,.3f} MB planned, {row['measured_bytes'] / 1e6:,.3f} measured"


TABLES: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "optimizer": optimizer_table, "kernels": kernels_table, "numerics": numerics_table,
    "step": step_table, "lowrank": lowrank_table, "update": update_table, "memory": memory_table,
}  # fmt: skip
# Tables whose rows stand in another's file.
ROWS = {"update": "lowrank"}


def main() -> None:
    """Write every table whose rows and markers exist."""
    for name, table in TABLES.items():
        rows = read_rows(ROWS.get(name, name))
        if rows and put(name, table(rows)):
            print(f"{name}: written")


if __name__ == "__main__":
    main()
