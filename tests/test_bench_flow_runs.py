"""Runs of the command that the page tells of: trained once, judged as asked, recorded once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import flow_runs, rows
from bench.flow_measures import Judge, load_pictures
from bench.flow_table import runs_table

OPTIONS = {"data": "digits", "groups": 2, "patch": 4, "steps": 2, "layers": 2, "hidden": 16, "heads": 2}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(load_pictures("digits")[0], passes=60)


@pytest.mark.slow
def test_a_run_is_trained_once_and_is_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start reads it; a folder of another run is refused, and one of a run that was stopped goes on."""
    told: list[list[str]] = []
    real = flow_runs.command
    monkeypatch.setattr(flow_runs, "command", lambda flags: told.append(flags) or real(flags))
    summary = flow_runs.trained(OPTIONS, tmp_path / "run", ["--samples", "0"])
    assert flow_runs.trained(OPTIONS, tmp_path / "run") == summary
    assert len(told) == 1
    with pytest.raises(SystemExit, match="'groups': 2"):
        flow_runs.trained({**OPTIONS, "groups": 1}, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    flow_runs.trained(OPTIONS, tmp_path / "run", ["--samples", "0"])
    assert "--resume" in told[-1]


def test_samples_count_where_they_are_the_digit_asked(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where they are another: real digits that are drawn a place off are all wrong."""
    train, _ = load_pictures("digits")
    first = torch.stack([train.pixels[train.labels == digit][0] for digit in range(10)])
    monkeypatch.setattr(flow_runs, "make_images", lambda model, labels, **_: first[labels])
    model: Any = None
    assert flow_runs.recognised(model, range(10), judge, 1.0) >= 0.9
    assert flow_runs.recognised(model, [(digit + 1) % 10 for digit in range(10)], judge, 1.0) <= 0.1


@pytest.mark.slow
def test_an_autoencoder_of_digits_is_made_and_judged(judge: Judge, tmp_path: Path) -> None:
    """Two steps leave less of a picture than twenty do."""
    pytest.importorskip("diffusers", reason="diffusers is not installed; its autoencoders make latents")
    train, held_out = load_pictures("digits")
    errors = []
    for steps in (2, 20):
        flow_runs.make_autoencoder(train.pixels, tmp_path / str(steps), steps)
        errors.append(flow_runs.restored(tmp_path / str(steps), held_out, judge)["error"])
    assert errors[1] < 0.9 * errors[0]


def test_rows_are_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the table has a line for each text and guidance."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    summary = {"eval_loss_before": 1.5, "eval_loss_after": 0.5}
    found = [{"told": "a {}", "guidance": each, "recognised": each / 10} for each in (1.0, 2.0)]
    for _ in range(2):
        flow_runs.add("beside a model", OPTIONS, found, summary)
    flow_runs.add("beside a model", OPTIONS, [{"told": "encoded", "recognised": 0.9}], summary)
    kept = [json.loads(line) for line in (tmp_path / "flow_runs.jsonl").read_text().splitlines()]
    assert len(kept) == 3
    assert runs_table(kept).splitlines()[2:] == [
        "| beside a model | 2 | 1.500 to 0.500 | a {} | 1 | 0.100 |",
        "| beside a model | 2 | 1.500 to 0.500 | a {} | 2 | 0.200 |",
        "| beside a model | 2 | 1.500 to 0.500 | encoded | - | 0.900 |",
    ]
