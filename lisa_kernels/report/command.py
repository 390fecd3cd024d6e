"""`lisa-kernels report`: the page of runs that are already there, and their figures as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lisa_kernels.report.compare import differing, figures
from lisa_kernels.report.page import write_page
from lisa_kernels.report.record import PAGE_FILE, read_runs


def report(folders: Sequence[Path], output: Path | None) -> dict[str, Any]:
    """Write the page of the runs in `folders`; returns its path, the runs' figures and the settings that differ.

    output: None for report.html in the run's folder, or of several runs in the current one. Raises InputError for a
    folder that holds no run.
    """
    runs = read_runs(folders)
    path = output or (folders[0] / PAGE_FILE if len(runs) == 1 else Path(PAGE_FILE))
    write_page(runs, path)
    return {"page": str(path), "runs": [figures(run) for run in runs], "settings_that_differ": differing(runs)}
