"""Which layers trained when, and by which scores they were drawn: a table with a row for each layer."""

from __future__ import annotations

import math
from html import escape

from lisa_kernels.report.numbers import number
from lisa_kernels.report.record import Run

# With more periods than this the white between two of them would be all that is seen.
MOST_GAPS = 80
_SCORES = {
    "outlier": "outlier ratio", "hill": "Hill's alpha", "weight-norm": "weight norm", "gradient-norm": "gradient norm",
}  # fmt: skip


def layer_map(run: Run, colour: int) -> str:
    """Return the map of one run, the layer nearest to the output on top."""
    draws, names = run.draws, run.layers
    if not draws or not names or run.settings.get("period") is None:
        return '<p class="note">Every layer trained in every step.</p>' if run.steps else ""
    scores = [score for score in run.run.get("scores") or [] if isinstance(score, (int, float))]
    # Embedding and head, where they are drawn, come after the blocks and have no score.
    scored, top = any(scores), max(scores, default=0.0)
    rows = []
    for layer in reversed(range(len(names))):
        spans = [(first, last) for first, last, layers in draws if layer in layers]
        taken = sum(last - first + 1 for first, last in spans)
        score = scores[layer] if layer < len(scores) else None
        cell = f'<td class="score">{_bar(score, top, colour)}</td>' if scored else ""
        rows.append(
            f'<tr><th scope="row">{escape(short_name(names[layer]))}</th><td class="map">'
            f"{_row(spans, run.steps, len(draws), short_name(names[layer]), colour)}</td>"
            f'<td class="visits">{taken:,}</td>{cell}</tr>'
        )
    kind = str(run.settings.get("scores") or "")
    head = f'<th scope="col" class="score">{escape(_SCORES.get(kind, kind or "score"))}</th>' if scored else ""
    return (
        f'<div class="scroll"><table class="layers"><thead><tr><th scope="col">layer</th>'
        f'<th scope="col" class="map"><span>step 1</span><span>{run.steps:,}</span></th>'
        f'<th scope="col" class="visits">steps</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def caption(run: Run) -> str:
    """Return in one sentence how layers were chosen."""
    draws = run.draws
    if not draws or run.settings.get("period") is None:
        return ""
    most = max(len(layers) for _, _, layers in draws)
    said = f"{most} of {len(run.layers)} layers at a time, drawn anew every {run.settings['period']:,} steps"
    kind, scores = str(run.settings.get("scores") or ""), run.run.get("scores") or []
    if kind in _SCORES and scores:
        score = _SCORES[kind]
        if len(set(scores)) == 1:
            return f"{said}; every layer has the same {score} ({number(scores[0])}), so each is as likely."
        return f"{said}; layers with a higher {score} are drawn more often."
    return f"{said}."


def short_name(path: str) -> str:
    """Return a layer's path as it is said: "layer 7" of model.layers.7."""
    last = path.rpartition(".")[2]
    return f"layer {last}" if last.isdigit() else last


def _row(spans: list[tuple[int, int]], steps: int, periods: int, name: str, colour: int) -> str:
    gap = 0.08 * steps / periods if periods <= MOST_GAPS else 0.0
    cells = "".join(
        f'<rect x="{first - 1}" width="{last - first + 1 - gap:.2f}" height="1">'
        f"<title>{escape(name)}: steps {first:,} to {last:,}</title></rect>"
        for first, last in spans
    )
    said = ", ".join(f"{first} to {last}" for first, last in spans) or "none"
    return (
        f'<svg class="cells c{colour}" viewBox="0 0 {steps} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(name)}, steps trained: {said}">{cells}</svg>'
    )


def _bar(score: float | None, top: float, colour: int) -> str:
    if score is None:
        return ""
    width = 100 * score / top if top > 0 else 0.0
    # The largest has three digits, all others as many decimals.
    decimals = min(6, max(0, 2 - math.floor(math.log10(top)))) if top > 0 else 0
    return f'<span class="bar c{colour}" style="width:{width:.1f}%"></span><span>{score:.{decimals}f}</span>'
