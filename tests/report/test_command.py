"""`lisa-kernels report`: where the page goes, what is told, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import history, write_run

from lisa_kernels.cli import main


def test_one_run_has_its_page_in_its_folder_and_several_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = write_run(Path("first")), write_run(Path("second"), history(6), finished=False, lr=2e-3)
    assert main(["report", str(first)]) == 0
    assert (first / "report.html").exists()
    assert main(["report", str(first), str(second), "--json"]) == 0
    out, err = capsys.readouterr()
    values = json.loads(out)
    assert values["page"] == "report.html"
    assert "page in report.html" in err
    assert Path("report.html").exists()
    assert [(run["run"], run["finished"], run["steps"]) for run in values["runs"]] == [
        ("first", True, 8),
        ("second", False, 6),
    ]
    assert values["runs"][0]["eval_loss_after"] == 2.1
    assert values["runs"][1]["eval_loss_after"] is None
    assert values["settings_that_differ"]["lr"] == [1e-3, 2e-3]
    assert "data" not in values["settings_that_differ"]


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_folder_without_a_run_is_one_sentence(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and no page, though the other folder holds a run."""
    run = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert main(["report", str(run), str(tmp_path / "empty"), "--output", str(tmp_path / "page.html"), *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert "holds no run" in err
    assert str(tmp_path / "empty") in err
    assert not (tmp_path / "page.html").exists()
