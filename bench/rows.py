"""Result rows: appended one by one, so that an interrupted benchmark goes on where it stopped."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "torchao", "flashoptim", "galore-torch", "badam")


def _versions() -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Return what a row needs to be judged later: commit, machine, versions, date."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent, check=False
    )
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "commit": git.stdout.strip() or "unknown",
        "device": device,
        "threads": torch.get_num_threads(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": _versions(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def read_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of `results/name.jsonl`, oldest first; a line cut short by a kill is left out."""
    path = RESULTS / f"{name}.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append_row(name: str, row: dict[str, Any]) -> None:
    """Add one row to `results/name.jsonl`."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({**row, **environment()}) + "\n")
