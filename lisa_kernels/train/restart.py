"""A run whose launcher has started its processes again goes on from its last checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lisa_kernels.distributed import Ranks, on_first, read_launcher
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.run_folder import RUN_FILE, write_json

# In run.json: the launchers, one on each machine, whose processes have had a part in the run.
LAUNCHERS = "launchers"


def find_launchers(ranks: Ranks | None) -> list[str]:
    """Return the names of those that have started these processes, each once; the same on all ranks."""
    mine = read_launcher()
    told = [mine] if ranks is None else ranks.tell(mine)
    return sorted({each for each in told if each})


def resumed_by_launcher(options: FineTuneOptions, launchers: list[str], ranks: Ranks | None) -> FineTuneOptions:
    """Return the options, as of --resume where one of these launchers has begun the run that is in its folder.

    With --overwrite too, whose work its first start has done. The run of another launch stays what it is.
    """
    if not launchers or not on_first(ranks, lambda: _is_theirs(options.output, launchers)):
        return options
    return dataclasses.replace(options, resume=True, overwrite=False)


def _is_theirs(folder: Path, launchers: list[str]) -> bool:
    """Return whether the run is theirs, and note machines that came later: they may be all that is left one day."""
    facts = _recorded(folder)
    before = facts.get(LAUNCHERS, [])
    if not set(before) & set(launchers):
        return False
    if not set(launchers) <= set(before):
        write_json(folder / RUN_FILE, {**facts, LAUNCHERS: sorted({*before, *launchers})})
    return True


def _recorded(folder: Path) -> dict[str, Any]:
    file = folder / RUN_FILE
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found
