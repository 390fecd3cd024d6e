"""A run of the command line that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def arguments(output: Path, *more: str) -> list[str]:
    """Return the arguments of a small training run; later flags win."""
    flags = ["--data", "digits", "--output", str(output), "--groups", "2", "--layers", "4", "--hidden", "64"]
    flags += ["--patch", "4", "--steps", "8", "--batch-size", "8", "--warmup-steps", "2", "--lr", "3e-3"]
    return ["flow", "train", *flags, *more]


def summary(output: Path) -> dict[str, Any]:
    """Return the run's summary."""
    values: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return values
