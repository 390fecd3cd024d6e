"""A run read from its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import history, said, write_run

from lisa_kernels.errors import InputError
from lisa_kernels.report.record import read_lines, read_run, read_runs


def test_curves_losses_and_periods_of_a_finished_run(tmp_path: Path) -> None:
    lines = [*history(), {"kind": "evaluation", "step": 4, "loss": 2.5}]
    run = read_run(write_run(tmp_path / "run", lines))
    assert run.finished
    assert run.steps == run.planned_steps == 8
    assert run.curve("grad_norm") == [(step, 1.5) for step in range(1, 9)]
    assert run.held_out == [(0, 3.0), (4, 2.5), (8, 2.1)]
    assert run.draws == [(1, 4, [0, 2]), (5, 8, [1, 2])]


def test_answers_are_paired_by_their_prompt(tmp_path: Path) -> None:
    lines = [*history(), said(0, ("why", "so", "err")), said(8, ("why", "so", "so"), ("how", "thus", "thus"))]
    first, second = read_run(write_run(tmp_path / "run", lines)).answers
    assert first == {"prompt": "why", "wanted": "so", "before": "err", "after": "so"}
    assert (second["before"], second["after"]) == (None, "thus")


def test_a_run_that_is_not_finished_is_as_long_as_its_lines(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", history(steps=6), finished=False))
    assert (run.finished, run.steps, run.planned_steps) == (False, 6, 8)
    assert run.draws == [(1, 4, [0, 2]), (5, 6, [1, 2])]


def test_a_line_that_a_kill_cut_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"kind": "log", "step": 9, "lo')
    assert read_run(folder).curve("loss")[-1][0] == 8


def test_a_broken_line_before_the_last_is_told(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"kind": "log", "step": 1}\nno json\n{"kind": "log", "step": 2}\n')
    with pytest.raises(InputError, match="line 2"):
        read_lines(path)


def test_without_a_history_the_last_checkpoint_tells(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    (folder / "history.jsonl").unlink()
    for step in (4, 10):
        (folder / f"checkpoint-{step}").mkdir()
        entries = [{"step": step, "loss": 2.0, "learning_rate": 1e-3}, {"step": step, "eval_loss": 2.2}]
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    run = read_run(folder)
    assert run.steps == 10
    assert (run.curve("loss"), run.held_out) == ([(10, 2.0)], [(0, 3.0), (10, 2.2)])


def test_what_is_no_run_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("[1]")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text("{")
    checkpoint = write_run(tmp_path / "run") / "checkpoint-4"
    checkpoint.mkdir()
    for folder, told in (
        (tmp_path / "nowhere", "no folder"), (tmp_path / "empty", "holds no run"),
        (tmp_path / "other", "no JSON object"), (tmp_path / "torn", "cannot be read"), (checkpoint, "is a checkpoint"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=told):
            read_run(folder)


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("a/run", "b/run", "c")]
    assert [run.name for run in read_runs(folders[1:])] == ["run", "c"]
    assert [run.name for run in read_runs(folders[:2])] == ["a/run", "b/run"]
    with pytest.raises(InputError, match="given twice"):
        read_runs([folders[0], folders[0] / ".." / "run"])
