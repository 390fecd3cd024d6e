"""A command line small enough to run in seconds, and the text that it trains on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = (
    "the state of a layer is kept in eight bits while",
    "its basis follows",
    "the gradient",
    "and the sampler draws",
)


def write_text(folder: Path) -> Path:
    """Write some 15 kB of text that a tiny model can learn from."""
    draw = random.Random(0)
    path = folder / "text.txt"
    path.write_text("\n".join(" ".join(draw.choices(WORDS, k=5)) + "." for _ in range(200)))
    return path


def arguments(data: Path, output: Path, *more: str, method: str = "lisa") -> list[str]:
    """Return the arguments of a small fine-tuning run; later flags win."""
    flags = ["--model", "preset:tiny", "--data", str(data), "--output", str(output), "--method", method, "--lr", "3e-3"]
    flags += ["--steps", "6", "--batch-size", "2", "--seq-len", "32", "--dtype", "fp32", "--eval-fraction", "0.1"]
    flags += ["--samples", "0", "--calibration-rows", "8"]
    if method not in ("full", "galore", "lora", "lora-fa"):
        flags += ["--period", "2"]
    if method in ("owlore", "galore", "lora", "lora-fa"):
        flags += ["--rank", "16"]
    return ["finetune", *flags, *more]


def summary(output: Path) -> dict[str, Any]:
    """Return the run's summary."""
    values: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return values
