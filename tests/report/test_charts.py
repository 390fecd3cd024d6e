"""Curves and areas: where their points are, and the values that stand beside them."""

from __future__ import annotations

import json
import re

from lisa_kernels.report.charts import Chart, Series, draw, inert_json


def paths(text: str, kind: str) -> list[str]:
    plot = text[text.index('class="area"') :]
    return re.findall(rf'<path class="{kind} [^"]*" d="([^"]*)"', plot)


def test_a_line_goes_from_corner_to_corner() -> None:
    text = draw(Chart("Loss", "nats", [Series("training", [(0, 1.0), (5, 2.0), (10, 3.0)])]))
    assert paths(text, "line") == ["M0 400L500 200L1000 0"]
    assert paths(text, "dots") == ["M0 400h0M500 200h0M1000 0h0"]


def test_areas_lie_on_each_other() -> None:
    series = [Series("low", [(0, 1.0), (1, 1.0)]), Series("high", [(0, 1.0), (1, 3.0)], 1)]
    below, above = paths(draw(Chart("Memory", "bytes", series, stacked=True)), "fill")
    assert below == "M0 300L1000 300L1000 400L0 400Z"
    assert above == "M0 200L1000 0L1000 300L0 300Z"


def test_values_of_all_curves_stand_in_one_row_where_they_share_a_step() -> None:
    text = draw(Chart("Loss", "nats", [Series("a", [(1, 1.0), (2, 2.0)]), Series("b", [(2, 3.0), (4, 4.0)])]))
    hover = json.loads(text[text.index('class="hover">') + 14 : text.index("</script>")])
    assert hover["rows"] == [["1", "1", "–"], ["2", "2", "3"], ["4", "–", "4"]]
    assert hover["x"] == [0.0, 0.3333, 1.0]
    assert '<tr><th scope="row">2</th><td>2</td><td>3</td></tr>' in text
    assert "a from 1 to 2; b from 3 to 4" in text, "what a reader of the screen hears"


def test_one_point_and_equal_values_are_drawn_and_nothing_is_not() -> None:
    assert paths(draw(Chart("Loss", "nats", [Series("a", [(3, 2.0)])])), "line")
    assert "nan" not in draw(Chart("Loss", "nats", [Series("a", [(0, 0.0), (1, 0.0)])], from_zero=True))
    assert draw(Chart("Loss", "nats", [Series("a", [])])) == ""


def test_json_in_a_page_ends_no_element() -> None:
    nasty = "</script><!--<script>&"
    assert not set(inert_json([nasty])) & set("<>&")
    assert json.loads(inert_json([nasty])) == [nasty]
