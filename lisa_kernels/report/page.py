"""The page: what a person wants to know first on top, then curves, layers, memory, answers and settings."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from lisa_kernels.errors import InputError
from lisa_kernels.report import answers, compare, layers, memory, pictures
from lisa_kernels.report.charts import Chart, Series, draw
from lisa_kernels.report.head import headline, tiles, unfinished
from lisa_kernels.report.numbers import loss, number
from lisa_kernels.report.record import Run


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Write the page of one or several runs, whole or not at all. Raises InputError where it cannot be written."""
    if path.is_dir():
        raise InputError(f"--output {path} is a folder; give a file such as {path / 'report.html'}.")
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(page(runs), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"the page {path} cannot be written ({error}); give another --output.") from error


def page(runs: Sequence[Run]) -> str:
    """Return the page as one HTML document that loads nothing; the same runs give the same bytes."""
    files = resources.files("lisa_kernels.report")
    script = (files / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    drawn = _each(runs, lambda run, _: pictures.section(run))
    sections = [
        ("curves", "Over the run", _curves(runs)),
        ("layers", "Which layers trained when", _each(runs, _layers)),
        ("memory", "Memory", _each(runs, lambda run, _: memory.section(run))),
        ("answers", "What the model says", _answers(runs)),
        ("pictures", "What the model draws", drawn),
        ("settings", compare.heading(runs), compare.settings_section(runs)),
    ]  # fmt: skip
    shown = [section for section in sections if section[2]]
    return Template((files / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        script_hash=digest,
        images=" img-src data:;" if drawn else "",
        style=(files / "page.css").read_text(encoding="utf-8"),
        script=script,
        headline=headline(runs),
        unfinished="".join(unfinished(run, len(runs) > 1) for run in runs),
        tiles=tiles(runs),
        links="".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in shown),
        sections="".join(
            f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(heading)}</h2>'
            f"{body}</section>"
            for name, heading, body in shown
        ),
    )


def _curves(runs: Sequence[Run]) -> str:
    several = len(runs) > 1
    names = {"loss": "loss", "learning_rate": "rate", "grad_norm": "norm", "tokens_per_second": "speed"}

    def of_runs(key: str) -> list[Series]:
        return [
            Series(run.name if several else names[key], run.curve(key), index, index) for index, run in enumerate(runs)
        ]

    unit = " or ".join(dict.fromkeys(run.loss_unit for run in runs))
    counted = " or ".join(dict.fromkeys(run.counted for run in runs))
    if several:
        held_out = [Series(run.name, run.held_out, index, index) for index, run in enumerate(runs)]
        losses = draw(Chart("Held-out loss", unit, held_out, loss, big=True))
        losses += draw(Chart("Training loss", unit, of_runs("loss"), loss, big=True))
    else:
        both = [Series("training", runs[0].curve("loss"), 0), Series("held out", runs[0].held_out, 1, 1)]
        losses = draw(Chart("Loss", unit, both, loss, big=True))
    small = [
        Chart("Learning rate", "of each step", of_runs("learning_rate"), number, from_zero=True),
        Chart("Gradient norm", "before clipping", of_runs("grad_norm"), number, from_zero=True),
        Chart("Speed", f"{counted} per second", of_runs("tokens_per_second"), number, from_zero=True),
    ]
    drawn = "".join(draw(chart) for chart in small)
    return losses + (f'<div class="panels">{drawn}</div>' if drawn else "")


def _layers(run: Run, index: int) -> str:
    drawn = layers.layer_map(run, index % 8)
    said = layers.caption(run)
    return (f'<p class="note">{escape(said)}</p>' if said else "") + drawn if drawn else ""


def _each(runs: Sequence[Run], section: Callable[[Run, int], str]) -> str:
    parts = [(run, index, section(run, index)) for index, run in enumerate(runs)]
    return "".join(
        (f'<h3><i class="swatch c{index % 8}"></i>{escape(run.name)}</h3>{text}' if len(runs) > 1 else text)
        for run, index, text in parts
        if text
    )


def _answers(runs: Sequence[Run]) -> str:
    cards = answers.section(runs)
    return (
        f'<p class="note">Held-out prompts, each continued by the likeliest token at every place.</p>{cards}'
        if cards
        else ""
    )
