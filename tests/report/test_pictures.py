"""The picture of a run within its page, and what its losses and speeds are called."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from run_folders import history, write_run

from lisa_kernels.report.page import page
from lisa_kernels.report.pictures import PICTURE_FILE
from lisa_kernels.report.record import read_runs

PNG = b"\x89PNG\r\n\x1a\n and what follows"


def test_a_picture_that_a_run_left_is_in_its_page(tmp_path: Path) -> None:
    """The page may show it, and may show none where there is none."""
    folder = write_run(tmp_path / "run", history())
    without = page(read_runs([folder]))
    (folder / PICTURE_FILE).write_bytes(PNG)
    text = page(read_runs([folder]))
    for part in (f"data:image/png;base64,{base64.b64encode(PNG).decode()}", "What the model draws", "img-src data:;"):
        assert part in text
        assert part not in without


@pytest.mark.parametrize("content", [b"<svg onload=alert(1)>", PNG + bytes(5 << 20)], ids=["no png", "too large"])
def test_what_is_no_picture_stays_out(content: bytes, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", history())
    (folder / PICTURE_FILE).write_bytes(content)
    assert "data:" not in page(read_runs([folder]))


def test_losses_and_speeds_of_images_are_called_so(tmp_path: Path) -> None:
    """In the words of the run; of a language model they stay nats, perplexity and tokens."""
    lines = history()
    plain = page(read_runs([write_run(tmp_path / "words", lines)]))
    lines[0] |= {"loss_unit": "squared error", "counted": "images"}
    flow = page(read_runs([write_run(tmp_path / "images", lines)]))
    for word in ("nats per token", "perplexity", "tokens/s", "tokens per second"):
        assert word in plain
        assert word not in flow
    for word in ("squared error", "images/s", "images per second"):
        assert word in flow
