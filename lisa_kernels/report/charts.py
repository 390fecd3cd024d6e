"""Lines and stacked areas over steps, as HTML: shapes in an SVG that stretches, words outside of it that do not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from lisa_kernels.report.numbers import NONE, number, ticks
from lisa_kernels.report.record import Points

# The SVG's own units; CSS gives the size.
WIDTH, HEIGHT = 1000, 400
# As many colours and dashes as page.css has; runs beyond begin anew with another dash.
COLOURS, DASHES = 8, 4
# The share of the x axis that the name of a part needs.
NARROW = 0.24
# A curve with no more points than this shows them.
MOST_DOTS = 30


@dataclass(frozen=True)
class Series:
    """One curve: its name in legend and table, (x, value) points, and the numbers of its colour and dash."""

    name: str
    points: Points
    colour: int = 0
    dash: int = 0

    @property
    def style(self) -> str:
        """The classes that colour and dash it."""
        return f"c{self.colour % COLOURS} d{self.dash % DASHES}"


@dataclass(frozen=True)
class Chart:
    """What a chart says, before it is drawn.

    title, unit: its heading and what the vertical axis counts. text, axis: how a value and a figure at the axis are
    written. x_name: what x counts.
    stacked: areas on top of each other instead of lines, on the same x. limit: (name, value) of a dashed line across.
    marks: (x, label) where a part of the x axis begins, in the place of figures. from_zero: the axis begins at 0.
    """

    title: str
    unit: str
    series: Sequence[Series]
    text: Callable[[float | None], str] = number
    axis: Callable[[float | None], str] = number
    x_name: str = "step"
    stacked: bool = False
    limit: tuple[str, float] | None = None
    marks: Sequence[tuple[float, str]] = ()
    from_zero: bool = False
    big: bool = False


@dataclass(frozen=True)
class _Axes:
    x_low: float
    x_high: float
    y_ticks: list[float]

    def x(self, value: float) -> float:
        return (value - self.x_low) / (self.x_high - self.x_low or 1.0)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return (value - low) / (high - low)


def draw(chart: Chart) -> str:
    """Return a figure with its legend, the values under the pointer, and a table of them; "" without any value."""
    chart_series = [series for series in chart.series if series.points]
    if not chart_series:
        return ""
    axes = _axes(chart, chart_series)
    shapes = _areas(chart_series, axes) if chart.stacked else _lines(chart_series, axes)
    grid = "".join(
        f'<line x1="0" x2="{WIDTH}" y1="{_v(axes, tick)}" y2="{_v(axes, tick)}" class="rule"/>' for tick in axes.y_ticks
    )
    if chart.limit is not None:
        at = _v(axes, chart.limit[1])
        shapes += f'<line x1="0" x2="{WIDTH}" y1="{at}" y2="{at}" class="limit"/>'
    shapes += "".join(
        f'<line x1="{_h(axes, x)}" x2="{_h(axes, x)}" y1="0" y2="{HEIGHT}" class="mark"/>' for x, _ in chart.marks[1:]
    )
    label = escape(f"{chart.title}, {chart.unit}, over {chart.x_name}s: {_in_words(chart, chart_series)}")
    steps, rows = _table(chart, chart_series)
    hover = {"x": [round(axes.x(step), 4) for step in steps], "rows": [list(row) for row in rows],
             "names": [chart.x_name, *(series.name for series in chart_series)],
             "styles": [series.style for series in chart_series]}  # fmt: skip
    return (
        f'<figure class="chart{" big" if chart.big else ""}"><figcaption><b>{escape(chart.title)}</b> '
        f'<span class="unit">{escape(chart.unit)}</span>{_legend(chart, chart_series)}</figcaption>'
        f'<div class="plot"><div class="ylabels" aria-hidden="true">{_y_labels(chart, axes)}</div>'
        f'<div class="area" tabindex="0" role="img" aria-label="{label}">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{grid}{shapes}</svg>'
        f'<div class="cross" hidden></div><div class="tip" hidden></div></div>'
        f'<div class="xlabels" aria-hidden="true">{_x_labels(chart, axes)}</div></div>'
        f'<script type="application/json" class="hover">{inert_json(hover)}</script>'
        f"{_details(chart, chart_series, rows)}</figure>"
    )


def inert_json(value: object) -> str:
    """Return JSON that nothing in it can end a script element with."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _axes(chart: Chart, series: Sequence[Series]) -> _Axes:
    xs = [x for one in series for x, _ in one.points]
    if chart.stacked:
        values = [sum(column) for column in zip(*([value for _, value in one.points] for one in series))]
    else:
        values = [value for one in series for _, value in one.points]
    if chart.limit is not None:
        values.append(chart.limit[1])
    low = 0.0 if chart.stacked or chart.from_zero else min(values)
    high = max(values)
    return _Axes(min(xs), max(xs), ticks(low, high if high > low or low else 1.0, 5 if chart.big else 4))


def _h(axes: _Axes, x: float) -> str:
    return f"{WIDTH * axes.x(x):.1f}".removesuffix(".0")


def _v(axes: _Axes, value: float) -> str:
    return f"{HEIGHT * (1 - axes.y(value)):.1f}".removesuffix(".0")


def _lines(series: Sequence[Series], axes: _Axes) -> str:
    shapes = []
    for one in series:
        spots = [f"{_h(axes, x)} {_v(axes, value)}" for x, value in one.points]
        shapes.append(f'<path class="line {one.style}" d="M{"L".join(spots)}"/>')
        if len(spots) <= MOST_DOTS:
            # A line of no length with round ends stays round where the SVG is stretched.
            dots = "".join(f"M{spot}h0" for spot in spots)
            shapes.append(f'<path class="dots {one.style}" d="{dots}"/>')
    return "".join(shapes)


def _areas(series: Sequence[Series], axes: _Axes) -> str:
    below = [0.0] * len(series[0].points)
    shapes = []
    for one in series:
        above = [low + value for low, (_, value) in zip(below, one.points)]
        up = [f"{_h(axes, x)} {_v(axes, top)}" for (x, _), top in zip(one.points, above)]
        down = [f"{_h(axes, x)} {_v(axes, low)}" for (x, _), low in zip(one.points, below)]
        shapes.append(f'<path class="fill {one.style}" d="M{"L".join([*up, *reversed(down)])}Z"/>')
        below = above
    return "".join(shapes)


def _y_labels(chart: Chart, axes: _Axes) -> str:
    return "".join(
        f'<span style="bottom:{100 * axes.y(tick):.1f}%">{escape(chart.axis(tick) if tick else "0")}</span>'
        for tick in axes.y_ticks
    )


def _x_labels(chart: Chart, axes: _Axes) -> str:
    if chart.marks:
        ends = [*(x for x, _ in chart.marks[1:]), axes.x_high]
        parts = [(axes.x(x), axes.x(end), label) for (x, label), end in zip(chart.marks, ends)]
        # The name of a narrow part would lie on its neighbour's; the value under the pointer has it.
        middles = [((low + high) / 2, label.rpartition(": ")[2]) for low, high, label in parts if high - low >= NARROW]
        return "".join(f'<span style="left:{100 * at:.1f}%">{escape(label)}</span>' for at, label in middles)
    inner = [tick for tick in ticks(axes.x_low, axes.x_high, 5) if axes.x_low <= tick <= axes.x_high]
    whole = [tick for tick in inner if tick == int(tick)]
    labels = "".join(f'<span style="left:{100 * axes.x(tick):.1f}%">{number(tick, 9)}</span>' for tick in whole)
    return f'{labels}<span class="xname">{escape(chart.x_name)}</span>'


def _legend(chart: Chart, series: Sequence[Series]) -> str:
    shape = "fill" if chart.stacked else "line"
    entries = [f"<li>{key(f'{shape} {one.style}', chart.stacked)}{escape(one.name)}</li>" for one in series]
    if chart.limit is not None:
        name, value = chart.limit
        entries.append(f"<li>{key('limit')}{escape(name)}: {escape(chart.text(value))}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>' if len(entries) > 1 else ""


def key(style: str, block: bool = False) -> str:
    """Return a piece of a curve, or of an area, for a legend."""
    shape = "M0 0h24v8h-24z" if block else "M0 4h24"
    return f'<svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path class="{style}" d="{shape}"/></svg>'


def _in_words(chart: Chart, series: Sequence[Series]) -> str:
    return "; ".join(
        f"{one.name} from {chart.text(one.points[0][1])} to {chart.text(one.points[-1][1])}" for one in series
    )


def _table(chart: Chart, series: Sequence[Series]) -> tuple[list[float], list[list[str]]]:
    """Return (every x, a row of texts for each: x, then each curve's value there)."""
    columns = [dict(one.points) for one in series]
    steps = sorted({x for column in columns for x in column})

    def x_text(x: float) -> str:
        part = [label for start, label in chart.marks if start <= x]
        return part[-1] if part else number(x, 9)

    return steps, [[x_text(x), *(chart.text(column[x]) if x in column else NONE for column in columns)] for x in steps]


def _details(chart: Chart, series: Sequence[Series], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in [chart.x_name, *(one.name for one in series)])
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(value)}</td>" for value in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<details class="values"><summary>{escape(chart.title)} as a table</summary><div class="scroll" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )
