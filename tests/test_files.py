"""A folder is whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from lisa_kernels.files import written_whole


@pytest.mark.parametrize("existed", [True, False], ids=["over an old folder", "anew"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, existed: bool) -> None:
    """The old folder keeps its content, and nothing is left of the new one."""
    target = tmp_path / "checkpoint-3"
    if existed:
        with written_whole(target) as folder:
            (folder / "value").write_text("old")

    def write_and_fail() -> None:
        with written_whole(target) as folder:
            (folder / "value").write_text("new")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert [path.name for path in tmp_path.iterdir()] == (["checkpoint-3"] if existed else [])
    assert not existed or (target / "value").read_text() == "old"


def test_a_whole_write_replaces_the_old_folder(tmp_path: Path) -> None:
    """What the old folder held is gone, and nothing lies beside the new one."""
    for text in ("old", "new"):
        with written_whole(tmp_path / "checkpoint-3") as folder:
            (folder / text).write_text(text)
    assert [path.name for path in (tmp_path / "checkpoint-3").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
