"""The memory of a run: what was planned, what was measured, and what the two figures count."""

from __future__ import annotations

from html import escape
from typing import Any

from lisa_kernels.report.charts import Chart, Series, draw
from lisa_kernels.report.numbers import NONE, bytes_text, percent
from lisa_kernels.report.record import Run

# A category has its colour wherever it is shown.
CATEGORIES = (
    "weights", "gradients", "optimizer state", "bases", "saved activations", "loss", "temporaries", "pages",
)  # fmt: skip
_HELD = CATEGORIES[:4]
_TABLE_NOTE = (
    "Like with like: the tensors held just before an optimizer step, at most, as planned and as counted in the run. "
    "The last column is the plan's peak."
)


def planned(run: Run) -> dict[str, Any]:
    """Return what the plan said before the run; empty where there was none."""
    plan: dict[str, Any] = run.begin.get("plan") or {}
    return plan


def peaks(run: Run) -> tuple[int | None, int | None]:
    """Return the (planned, measured) peak in bytes; of an unfinished run the measured one so far."""
    logged = [line["peak_bytes"] for line in run.logs if line.get("peak_bytes") is not None]
    measured = run.summary.get("peak_bytes_measured", max(logged, default=None))
    return run.summary.get("peak_bytes_planned", planned(run).get("peak_bytes")), measured


def counted(run: Run) -> str:
    """Return what the measured peak counts."""
    if run.begin.get("device", "cpu") == "cpu":
        return "growth of the process"
    return "tensors on the GPU"


def section(run: Run) -> str:
    """Return tables and charts of one run's memory; "" where nothing is known."""
    plan, (plan_peak, peak) = planned(run), peaks(run)
    if plan_peak is None and peak is None:
        return ""
    on_cpu = run.begin.get("device", "cpu") == "cpu"
    text = [f"At the peak: {bytes_text(peak)} measured ({counted(run)})"]
    if plan_peak is not None:
        text.append(f"{bytes_text(plan_peak)} planned (tensors alive at once)")
    said = ", ".join(text) + "."
    if on_cpu:
        said += (
            " On a CPU a process grows by another amount: libraries and buffers count, memory that it had freed before"
            " does not."
        )
    charts = _held(run) + _peak(run) + _rehearsal(plan)
    return f'<p class="note">{escape(said)}</p>{_table(run, plan)}<div class="panels">{charts}</div>'


def most_held(run: Run) -> dict[str, int]:
    """Return the most bytes that each category held before an optimizer step, over the run."""
    held = [line["held_bytes"] for line in run.logs if line.get("held_bytes")]
    return {name: max(sample.get(name, 0) for sample in held) for name in _HELD} if held else {}


def _table(run: Run, plan: dict[str, Any]) -> str:
    measured, before, at_peak = most_held(run), plan.get("held_bytes") or {}, plan.get("split_bytes") or {}
    if not measured and not at_peak:
        return ""
    names = [name for name in CATEGORIES if measured.get(name) or before.get(name) or at_peak.get(name)]
    rows = [
        f'<tr><th scope="row"><i class="swatch c{CATEGORIES.index(name)}"></i>{name}</th>'
        f"<td>{bytes_text(before.get(name)) if name in _HELD else NONE}</td>"
        f"<td>{bytes_text(measured.get(name)) if name in _HELD else NONE}</td>"
        f"<td>{bytes_text(at_peak.get(name))}</td></tr>"
        for name in names
    ]
    totals = [sum(column.values()) if column else None for column in (before, measured, at_peak)]
    change = f" ({percent(totals[1], totals[0])})" if totals[0] and totals[1] else ""
    return (
        f'<p class="note">{_TABLE_NOTE}</p><div class="scroll" tabindex="0"><table class="figures">'
        '<thead><tr><th scope="col">tensors</th><th scope="col">planned, held</th><th scope="col">measured, held</th>'
        f'<th scope="col">planned, at the peak</th></tr></thead><tbody>{"".join(rows)}</tbody>'
        f'<tfoot><tr><th scope="row">in all</th><td>{bytes_text(totals[0])}</td>'
        f"<td>{bytes_text(totals[1])}{change}</td><td>{bytes_text(totals[2])}</td></tr></tfoot></table></div>"
    )


def _held(run: Run) -> str:
    samples = [(line["step"], line["held_bytes"]) for line in run.logs if line.get("held_bytes")]
    series = [
        Series(name, [(step, held.get(name, 0)) for step, held in samples], CATEGORIES.index(name))
        for name in _HELD
        if any(held.get(name) for _, held in samples)
    ]
    before = planned(run).get("held_bytes")
    limit = ("planned, at most", float(sum(before.values()))) if before else None
    return draw(
        Chart(
            "Measured", "bytes of tensors held before a step", series, bytes_text, bytes_text, stacked=True, limit=limit
        )
    )


def _peak(run: Run) -> str:
    """Draw the measured peak so far; the plan's is beside it where both count the same."""
    limit = peaks(run)[0] if run.begin.get("device", "cpu") != "cpu" else None
    series = [Series("measured", run.curve("peak_bytes"), 7)]
    drawn = ("planned", float(limit)) if limit is not None else None
    return draw(Chart("Peak so far", counted(run), series, bytes_text, bytes_text, from_zero=True, limit=drawn))


def _rehearsal(plan: dict[str, Any]) -> str:
    curve = plan.get("curve") or {}
    series = [
        Series(name, list(enumerate(curve[name])), CATEGORIES.index(name))
        for name in CATEGORIES
        if any(curve.get(name, []))
    ]
    marks = [(start, label) for start, label in plan.get("phases", [])]
    unit = "bytes of tensors alive in the rehearsed steps"
    return draw(Chart("Planned", unit, series, bytes_text, bytes_text, x_name="moment", stacked=True, marks=marks))
