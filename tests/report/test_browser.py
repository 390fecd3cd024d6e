"""The page in a real browser: on a phone and on a desk, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find_browser
from run_folders import history, said, write_run

from lisa_kernels.report.page import write_page
from lisa_kernels.report.record import read_runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="there is no Chromium on the PATH to open the page in"),
]
LONG = "aVeryLongWordThatNothingBreaks" * 12
NASTY = "</script><script>document.title = 'mine'</script><img src=x onerror=\"document.title = 'mine'\">"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    assert program is not None
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module", params=["one", "several"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of one run, or of three, with long words and what would be harmful were it not text."""
    folder = tmp_path_factory.mktemp(request.param)
    before, after = [(NASTY, LONG, LONG), (LONG * 3, LONG, "")], [(NASTY, LONG, NASTY), (LONG * 3, "", LONG)]
    lines = [*history(), said(0, *before), said(8, *after)]
    folders = [write_run(folder / "first", lines, data=LONG), write_run(folder / LONG[:200], lines, method="lisa"),
               write_run(folder / "unfinished", history(6), finished=False)]  # fmt: skip
    page = folder / "report.html"
    write_page(read_runs(folders[:1] if request.param == "one" else folders), page)
    return page.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_has_nothing_to_complain_of(browser: Browser, address: str, width: int, scheme: str) -> None:
    """No error in the console, nothing loaded, nothing wider than the window, and a background of the scheme."""
    browser.open(address, width, 800, scheme)
    browser.value("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('figure.chart').length") >= 5
    assert browser.value("document.title") != "mine"
    red, green, blue = browser.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (red + green + blue > 3 * 128) == (scheme == "light")
    assert browser.complaints() == []
    assert browser.addresses() == [address]


@pytest.mark.parametrize("width", [360, 1280])
def test_words_lie_inside_of_what_holds_them(browser: Browser, address: str, width: int) -> None:
    """Labels of axes and names in legends do not reach out of their chart, and no figure of the map is cut."""
    browser.open(address, width, 800, "light")
    outside = """[...document.querySelectorAll("figure.chart")].flatMap((figure) => {
      const box = figure.getBoundingClientRect();
      return [...figure.querySelectorAll(".ylabels span, .xlabels span, .legend li")].filter((label) => {
        const own = label.getBoundingClientRect();
        return own.left < box.left || own.right > box.right;
      }).map((label) => label.textContent);
    })"""
    assert browser.value(outside) == []
    cut = """[...document.querySelectorAll(".layers tbody th, .layers td.score, .layers td.visits")]
      .filter((cell) => cell.scrollWidth > cell.clientWidth).map((cell) => cell.textContent)"""
    assert browser.value(cut) == []


def test_a_page_with_faults_is_seen(browser: Browser, tmp_path: Path) -> None:
    """Negative control: an error, an address, and a line wider than the window."""
    page = tmp_path / "faults.html"
    page.write_text("<p style='width: 2000px'>wide</p><img src='missing.png'><script>throw new Error('no')</script>")
    browser.open(page.as_uri(), 360, 800, "light")
    assert browser.value("document.documentElement.scrollWidth") > 360
    assert {event["method"] for event in browser.complaints()} >= {"Runtime.exceptionThrown"}
    assert len(browser.addresses()) == 2


def test_values_are_under_the_pointer_and_under_the_arrow_keys(browser: Browser, address: str) -> None:
    browser.open(address, 1280, 800, "light")
    browser.value("document.querySelector('.area').scrollIntoView({block: 'center', behavior: 'instant'})")
    box = browser.value("Object.values(document.querySelector('.area').getBoundingClientRect().toJSON())")
    assert browser.value("document.querySelector('.tip').hidden")
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + box[2] - 2, y=box[1] + box[3] / 2)
    shown = browser.value("document.querySelector('.tip').textContent")
    assert shown.startswith("step8")
    assert "2.1" in shown
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert browser.value("document.querySelector('.tip').hidden")
    browser.value("document.querySelector('.area').focus()")
    browser.ask("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    assert browser.value("document.querySelector('.tip').textContent").startswith("step0")
    assert browser.complaints() == []
