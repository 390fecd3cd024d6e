"""The map of which layers trained when."""

from __future__ import annotations

import re
from pathlib import Path

from run_folders import history, write_run

from lisa_kernels.report.layers import caption, layer_map, short_name
from lisa_kernels.report.record import read_run


def test_a_row_has_a_cell_for_each_period_in_which_its_layer_trained(tmp_path: Path) -> None:
    text = layer_map(read_run(write_run(tmp_path / "run")), 0)
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>.*?aria-label="(.*?)".*?class="visits">(\d+)<', text)
    assert [(name, steps) for name, _, steps in rows] == [
        ("layer 39", "0"),
        ("layer 2", "8"),
        ("layer 1", "4"),
        ("layer 0", "4"),
    ]
    assert [said.partition(": ")[2] for _, said, _ in rows] == ["none", "1 to 4, 5 to 8", "5 to 8", "1 to 4"]
    assert "layer 1: steps 5 to 8" in text
    assert 'style="width:100.0%"' in text
    assert 'style="width:25.0%"' in text


def test_the_sentence_says_how_layers_were_chosen(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert caption(run) == (
        "2 of 4 layers at a time, drawn anew every 4 steps; layers with a higher outlier ratio are drawn more often."
    )
    run.run["scores"] = [0.0] * 4
    assert caption(run).endswith("every layer has the same outlier ratio (0), so each is as likely.")


def test_without_draws_every_layer_trained(tmp_path: Path) -> None:
    lines = [line for line in history() if line["kind"] != "draw"]
    run = read_run(write_run(tmp_path / "run", lines))
    run.summary["settings"] = {"rank": 16}
    assert "Every layer trained in every step" in layer_map(run, 0)
    assert caption(run) == ""


def test_layers_have_short_names() -> None:
    names = ("model.layers.7", "transformer.h.0", "lm_head", "model.embed_tokens")
    assert [short_name(name) for name in names] == ["layer 7", "layer 0", "lm_head", "embed_tokens"]
