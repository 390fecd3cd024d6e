"""A run of the command line that takes seconds."""

from __future__ import annotations

import json
import shutil
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


def forget_after(output: Path, step: int) -> bytes:
    """Make of a finished run one that was stopped after its checkpoint of a step; returns the flow that it had made."""
    made = (output / "flow.safetensors").read_bytes()
    for path in output.iterdir():
        if path.is_file() and path.name not in ("run.json", "history.jsonl"):
            path.unlink()
        elif path.name.startswith("checkpoint-") and int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)
    return made
