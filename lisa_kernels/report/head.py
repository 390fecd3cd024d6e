"""The top of the page: did it learn, and what did it take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from lisa_kernels.report.charts import Series, key
from lisa_kernels.report.compare import best, figures, same_rows
from lisa_kernels.report.memory import counted
from lisa_kernels.report.numbers import NONE, bytes_text, duration, loss, number, percent, speed
from lisa_kernels.report.record import NATS, Run

# A change of a loss that is smaller than this share of it is none.
_NOTHING = 0.001
_OTHER_ROWS = "The runs differ in model, data or how rows are cut: their losses are not of the same tokens."
_TABLE_NOTE = (
    "Losses in {units}; time and speed of training steps alone; memory measured is the growth of the process on "
    "a CPU, the allocator's peak on a GPU; planned is that of tensors."
)


def _losses(values: dict[str, Any]) -> tuple[str, float | None, float | None]:
    """Return (its name, before, after) of the loss that tells whether the run learnt: the held-out one, if there is."""
    if values["eval_loss_before"] is not None and values["eval_loss_after"] is not None:
        return "Held-out loss", values["eval_loss_before"], values["eval_loss_after"]
    return "Training loss", values["train_loss_first"], values["train_loss_last"]


def _verdict(values: dict[str, Any]) -> str:
    name, before, after = _losses(values)
    diverged = values["finished"] and values["eval_loss_before"] is not None and values["eval_loss_after"] is None
    if diverged or before is None or after is None:
        return "The run diverged: its loss is no number" if values["finished"] else "No loss is recorded yet"
    name = name.lower()
    if abs(after - before) <= _NOTHING * before:
        return f"It did not learn: {name} stayed at {loss(after)}"
    change = percent(after, before)[1:]
    return f"It learnt: {name} fell by {change}" if after < before else f"It did not learn: {name} rose by {change}"


def headline(runs: Sequence[Run]) -> str:
    """Return the heading: in one sentence whether the run learnt, or which of several learnt most."""
    if len(runs) == 1:
        values = figures(runs[0])
        data = runs[0].options.get("data")
        sources = data if isinstance(data, str) or data is None else ", ".join(data)
        words = [values["model"], values["method"], f"{values['steps']:,} steps", sources]
        about = " · ".join(escape(str(word)) for word in words if word)
        name, verdict = escape(runs[0].name), escape(_verdict(values))
        return f'<p class="kicker">{name}</p><h1>{verdict}</h1><p class="about">{about}</p>'
    winner = best(runs)
    verdict = f"{len(runs)} runs side by side"
    if winner is not None:
        after = figures(winner)["eval_loss_after"]
        verdict = f"Lowest held-out loss: {winner.name}, {loss(after)}"
    about = "" if same_rows(runs) else f'<p class="about">{_OTHER_ROWS}</p>'
    return f'<p class="kicker">{len(runs)} fine-tuning runs</p><h1>{escape(verdict)}</h1>{about}'


def unfinished(run: Run, named: bool) -> str:
    """Return what to say of a run that did not come to its end; "" of one that did."""
    if run.finished:
        return ""
    whole = f" of {run.planned_steps:,}" if run.planned_steps else ""
    who = f"The run {run.name}" if named else "This run"
    known = "" if run.lines else " Its folder holds no history: only its settings are known."
    return (
        f'<p class="warning" role="note">{escape(who)} is not finished: step {run.steps:,}{whole} is the last that its '
        f"folder tells of.{known}</p>"
    )


def tiles(runs: Sequence[Run]) -> str:
    """Return the figures of a run as tiles, or of several runs as a table."""
    return _tiles(runs[0]) if len(runs) == 1 else _table(runs)


def _tiles(run: Run) -> str:
    values = figures(run)
    name, before, after = _losses(values)
    found = []
    if before is not None and after is not None:
        nats = run.loss_unit == NATS
        note = f"perplexity {_perplexity(before)} → {_perplexity(after)}" if nats else run.loss_unit
        found.append((name, f"{loss(before)} → {loss(after)}", f"{percent(after, before)} · {note}"))
    peak, planned = values["peak_bytes_measured"], values["peak_bytes_planned"]
    if peak is not None:
        beside = f" · {bytes_text(planned)} of tensors planned" if planned is not None else ""
        found.append(("Peak memory", bytes_text(peak), f"{counted(run)}{beside}"))
    if values["seconds"] is not None:
        found.append(("Training time", duration(values["seconds"]), f"{values['steps']:,} steps, evaluation left out"))
    if values["tokens_per_second"]:
        found.append(("Speed", speed(values["tokens_per_second"], run.counted), _trained(run)))
    return '<dl class="tiles">' + "".join(
        f"<div><dt>{escape(title)}</dt><dd><b>{escape(value)}</b><span>{escape(note)}</span></dd></div>"
        for title, value, note in found
    ) + "</dl>" if found else ""  # fmt: skip


def _trained(run: Run) -> str:
    active = max((len(layers) for _, _, layers in run.draws), default=0)
    parts = [f"{active} of {len(run.layers)} layers at a time"] if active else []
    rank = run.settings.get("rank")
    return ", ".join([*parts, *([f"rank {rank}"] if rank else [])])


def _perplexity(value: float) -> str:
    return number(math.exp(value)) if value < 700 else NONE


def _table(runs: Sequence[Run]) -> str:
    heads = [
        "run", "held-out loss", "change", "training loss", "peak memory", "planned", "time", "speed", "steps", "method",
    ]  # fmt: skip
    rows = []
    for index, run in enumerate(runs):
        values = figures(run)
        before, after = values["eval_loss_before"], values["eval_loss_after"]
        cells = [
            f"{loss(before)} → {loss(after)}", percent(after, before) if before and after is not None else NONE,
            f"{loss(values['train_loss_first'])} → {loss(values['train_loss_last'])}",
            bytes_text(values["peak_bytes_measured"]), bytes_text(values["peak_bytes_planned"]),
            duration(values["seconds"]), speed(values["tokens_per_second"], run.counted),
            f"{values['steps']:,}" + ("" if run.finished else " (not finished)"), str(values["method"] or NONE),
        ]  # fmt: skip
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        style = f"line {Series(run.name, [], index, index).style}"
        rows.append(f'<tr><th scope="row">{key(style)}{escape(run.name)}</th>{row}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    note = escape(_TABLE_NOTE.format(units=" or ".join(dict.fromkeys(run.loss_unit for run in runs))))
    return (
        f'<div class="scroll overview" tabindex="0"><table class="figures runs"><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="note">{note}</p>'
    )
