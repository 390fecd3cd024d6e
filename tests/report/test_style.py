"""The colours of the page can be told from what lies behind them, in light and in dark."""

from __future__ import annotations

import re
from importlib import resources

import pytest

STYLE = (resources.files("lisa_kernels.report") / "page.css").read_text()
LIGHT, DARK = (
    dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    for block in re.findall(r":root \{(.*?)\}", STYLE, flags=re.S)
)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_words_and_curves_stand_out(scheme: dict[str, str]) -> None:
    """4.5 for text and 3 for shapes, as WCAG 2 has it at level AA."""
    for paper in ("paper", "card"):
        for ink in ("ink", "soft", "c0"):
            assert contrast(scheme[ink], scheme[paper]) >= 4.5, (ink, paper)
        for number in range(8):
            assert contrast(scheme[f"c{number}"], scheme[paper]) >= 3, (number, paper)
    assert contrast(scheme["warn-ink"], scheme["warn-paper"]) >= 4.5


def test_both_schemes_have_the_same_names() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert LIGHT["paper"] != DARK["paper"]


def test_contrast_is_measured() -> None:
    """Negative control: grey on white does not pass."""
    assert round(contrast("#000000", "#ffffff")) == 21
    assert contrast("#999999", "#ffffff") < 4.5
