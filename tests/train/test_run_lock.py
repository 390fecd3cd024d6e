"""Two runs in one folder: the second is refused while the first lives, and by nothing that it left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_run import arguments, write_text

from lisa_kernels import InputError
from lisa_kernels.cli import main
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.run_folder import RUN_FILE, start_run
from lisa_kernels.train.run_lock import RunLock

HOLD = """
import sys
from pathlib import Path
from lisa_kernels.train.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def _options(folder: Path, **more: bool) -> FineTuneOptions:
    return FineTuneOptions(model="preset:tiny", data="stdlib", output=folder, **more)  # type: ignore[arg-type]


def test_a_folder_in_which_a_process_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To resume it and to overwrite it; when that process is killed nothing blocks."""
    run = tmp_path / "run"
    start_run(_options(run), {})
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        for flag in ("--resume", "--overwrite"):
            assert main(arguments(write_text(tmp_path), run, flag)) == 2
            assert "another process is running in --output" in capsys.readouterr().err
        assert (run / RUN_FILE).exists()
    finally:
        other.kill()
        other.communicate()
    with RunLock(run):
        pass


def test_a_lock_is_given_back_and_taken_on_the_file_that_is_there(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run") as lock:
        start_run(_options(tmp_path / "run"), {})
        lock.take()
        with pytest.raises(InputError), RunLock(tmp_path / "run"):
            pass
        start_run(_options(tmp_path / "run", overwrite=True), {})
        lock.take()
        with pytest.raises(InputError), RunLock(tmp_path / "run"):
            pass
    with RunLock(tmp_path / "run"):
        pass


def test_a_run_that_began_while_this_one_prepared_is_left_alone(tmp_path: Path) -> None:
    start_run(_options(tmp_path), {"whose": "the first"})
    with pytest.raises(InputError, match="meanwhile"):
        start_run(_options(tmp_path), {"whose": "the second"})
    assert "the first" in (tmp_path / RUN_FILE).read_text()
