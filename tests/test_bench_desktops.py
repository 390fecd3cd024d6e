"""Two desktops are tried by the command that the page on them gives, and by root alone."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from bench import desktops
from bench.desktops import HAPPENINGS, RESTARTS, Desktop, Trial, words_of
from bench.link import End

PAGE = Path(__file__).parents[1] / "lisa_kernels" / "distributed" / "README.md"


def test_the_page_s_command_is_tried() -> None:
    """The launcher's flags are the page's, address and port aside."""
    page = PAGE.read_text().partition("## Two desktops")[2]
    shown = shlex.split(page.partition("\ntorchrun ")[2].partition("\n```")[0].replace("\\\n", ""))
    tried = words_of(0, Path("data"), Path("run"))
    names = {word for word in shown[: shown.index("--no-python")] if word.startswith("--")}
    assert names == {word for word in tried[: tried.index("finetune")] if word.startswith("--")}
    for name in ("--nnodes", "--node-rank", "--nproc-per-node", "--max-restarts"):
        assert shown[shown.index(name) + 1] == tried[tried.index(name) + 1]
    assert tried[tried.index("--max-restarts") + 1] == f"{RESTARTS}"


def test_a_happening_is_chosen_by_its_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside what is left alone; one that is not known, and who may make no namespaces, is told."""
    tried: list[str] = []
    trial = Trial("nothing", 1.0, None, None, 0, 10**6, None)
    monkeypatch.setattr(desktops, "try_one", lambda name, *_: tried.append(name) or trial)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert desktops.main(["--only", "the first's process is killed", "--json"]) == 0
    assert tried == ["nothing", "the first's process is killed"]
    assert desktops.main([]) == 0
    assert tried[2:] == list(HAPPENINGS)
    assert desktops.main(["--only", "rain"]) == 2
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert desktops.main([]) == 2
    assert "root" in capsys.readouterr().err


def test_what_was_said_is_found_by_when_it_was_said(tmp_path: Path) -> None:
    desktop = Desktop("one", End("a", "b", "c"), tmp_path, said=[(1.0, "step 1/2"), (5.0, "step 2/2")])
    assert desktop.when("step", since=0.5) == 0.5
    assert desktop.when("step", since=3.0) == 2.0
    assert desktop.when("step", since=6.0) is None
