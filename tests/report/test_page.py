"""The page: one file, the same bytes each time, and nothing in the data that could become part of it."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_folders import history, said, write_run

from lisa_kernels.errors import InputError
from lisa_kernels.report.page import page, write_page
from lisa_kernels.report.record import read_runs

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;${x}$title"


class Elements(HTMLParser):
    """The elements of a page with their attributes, and that each one is closed in its turn."""

    VOID = ("meta", "path", "line", "br")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def of(*folders: Path) -> str:
    return page(read_runs(folders))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", [*history(), said(0, ("why", "so", "err")), said(8, ("why", "so", "so"))])


def test_it_says_first_whether_the_run_learnt_and_what_it_took(folder: Path) -> None:
    text = of(folder)
    elements = Elements(text)
    assert not elements.open
    assert "<h1>It learnt: held-out loss fell by 30 %</h1>" in text
    for figure in ("−30 %", "31 MB", "20 MB of tensors planned", "16 s", "104 tokens/s"):
        assert figure in text
    headings = [attributes["id"] for attributes in elements.named("section")]
    assert headings == ["curves", "layers", "memory", "answers", "settings"]
    for title in ("Loss", "Learning rate", "Gradient norm", "Speed", "Measured", "Planned"):
        assert f"<b>{title}</b>" in text


def test_it_loads_nothing(folder: Path) -> None:
    """No address of any kind, and a policy that forbids what is not in the file."""
    text = of(folder)
    assert not re.search(r"(?:https?:)?//[a-z]|url\(|@import", re.sub(r"<script>.*?</script>", "", text, flags=re.S))
    elements = Elements(text)
    assert not [attributes for _, attributes in elements.found if "src" in attributes]
    assert all(str(link["href"]).startswith("#") for link in elements.named("a"))
    policy = next(str(meta["content"]) for meta in elements.named("meta") if meta.get("http-equiv"))
    script = text[text.rindex("<script>") + 8 : text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_same_run_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_page(read_runs([folder]), tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_what_runs_say_stays_text(tmp_path: Path) -> None:
    """Prompts, answers, settings, names of layers and of folders cannot end an element or begin one."""
    lines = [
        *history(),
        said(0, (NASTY, NASTY, NASTY)),
        said(8, (NASTY, NASTY, NASTY * 20), (NASTY * 20, NASTY, NASTY)),
    ]
    lines[0]["layers"] = [f"model.layers.{NASTY}{number}" for number in range(4)]
    lines[0]["plan"]["phases"] = [[0, NASTY], [1, NASTY]]
    folder = write_run(tmp_path / "<b>run&", lines, data=NASTY, model=NASTY, method=NASTY)
    other = write_run(tmp_path / "other", lines, data="plain")
    for text in (of(folder), of(folder, other)):
        elements = Elements(text)
        assert not elements.open
        assert not elements.named("img")
        assert [script for script in elements.named("script") if script.get("type") != "application/json"] == [{}]
        assert not [attributes for _, attributes in elements.found if any(name.startswith("on") for name in attributes)]
        assert any(NASTY in piece for piece in elements.text)


def test_several_runs_have_a_colour_a_name_and_the_settings_that_differ(folder: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", after=1.9, method="lisa")
    text = of(folder, other)
    assert "<h1>Lowest held-out loss: other, 1.900</h1>" in text
    assert 'class="line c0 d0"' in text
    assert 'class="line c1 d1"' in text
    unfinished = write_run(tmp_path / "third", history(6), finished=False)
    assert "<h1>2 runs side by side</h1>" in of(folder, unfinished), "a loss on the way is no result"
    settings = text[text.index('id="settings"') :]
    shown = settings[: settings.index("<details")]
    assert "owlore" in shown
    assert "lisa" in shown
    assert "preset:tiny" not in shown, "what both have in common is folded away"


def test_a_run_that_is_not_finished_says_so(tmp_path: Path) -> None:
    text = of(write_run(tmp_path / "run", history(steps=6), finished=False))
    assert "This run is not finished: step 6 of 8" in text
    assert "<h1>It learnt: training loss fell by 17 %</h1>" in text
    bare = of(write_run(tmp_path / "bare", [], finished=False))
    assert "only its settings are known" in bare
    assert "<h1>No loss is recorded yet</h1>" in bare


def test_a_loss_that_rose_is_no_success(tmp_path: Path) -> None:
    assert "<h1>It did not learn: held-out loss rose by 17 %</h1>" in of(write_run(tmp_path / "run", after=3.5))
    assert "<h1>It did not learn: held-out loss stayed at 3.000</h1>" in of(write_run(tmp_path / "same", after=3.0001))


def test_a_run_that_diverged_says_so(tmp_path: Path) -> None:
    """NaN, as Python writes it, is no number."""
    lines = [{**line, "loss": None} if line["kind"] == "log" else line for line in history()]
    folder = write_run(tmp_path / "run", lines, after=float("nan"))
    assert "NaN" in (folder / "summary.json").read_text()
    text = of(folder)
    assert "<h1>The run diverged: its loss is no number</h1>" in text
    assert not re.search(r"\bnan\b", text, flags=re.I)


def test_a_page_that_cannot_be_written_is_told(folder: Path, tmp_path: Path) -> None:
    for path, told in ((tmp_path, "is a folder"), (tmp_path / "missing" / "page.html", "cannot be written")):
        with pytest.raises(InputError, match=told):
            write_page(read_runs([folder]), path)
