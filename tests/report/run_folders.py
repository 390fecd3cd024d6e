"""Folders as runs leave them, without a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MB = 10**6
LAYERS = [f"model.layers.{number}" for number in (0, 1, 2, 39)]


def history(steps: int = 8, loss: float = 3.0) -> list[dict[str, Any]]:
    """Return the lines of a run of `steps` steps that draws two of four layers every four steps."""
    held = {"weights": 8 * MB, "gradients": MB, "optimizer state": MB, "bases": MB}
    plan = {
        "peak_bytes": 20 * MB, "split_bytes": {**held, "temporaries": 9 * MB}, "held_bytes": held,
        "curve": {"weights": [8 * MB] * 4, "temporaries": [0, MB, 9 * MB, 0]}, "phases": [[0, "attach"], [1, "step 1"]],
    }  # fmt: skip
    begin = {
        "max_steps": 8,
        "device": "cpu",
        "parameters": 1000,
        "layers": LAYERS,
        "defaults": {"lr": None},
        "plan": plan,
    }
    lines: list[dict[str, Any]] = [{"kind": "begin", "step": 0, **begin}]
    for step in range(1, steps + 1):
        if step % 4 == 1:
            lines.append({"kind": "draw", "step": step - 1, "layers": [0, 2] if step == 1 else [1, 2]})
        lines.append(
            {
                "kind": "log",
                "step": step,
                "loss": loss - 0.1 * step,
                "learning_rate": 1e-3 / step,
                "grad_norm": 1.5,
                "seconds": 2.0 * step,
                "tokens_per_second": 100.0 + step,
                "held_bytes": held,
                "peak_bytes": 30 * MB,
            }
        )
    return lines


def said(step: int, *answers: tuple[str, str, str]) -> dict[str, Any]:
    """Return the line of (prompt, wanted, answer)."""
    names = ("prompt", "wanted", "answer")
    return {"kind": "answers", "step": step, "answers": [dict(zip(names, answer)) for answer in answers]}


def write_run(
    folder: Path, lines: list[dict[str, Any]] | None = None, finished: bool = True, after: float | None = 2.1,
    **options: Any,
) -> Path:  # fmt: skip
    """Write the folder of a run; returns it."""
    folder.mkdir(parents=True)
    given = {"model": "preset:tiny", "data": "rows.jsonl", "method": "owlore", "lr": 1e-3, "steps": 8, **options}
    run = {"options": given, "eval_loss_before": 3.0, "scores": [0.00244, 0.00976, 0.00488, 0.004]}
    (folder / "run.json").write_text(json.dumps(run))
    lines = history() if lines is None else lines
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = {
            "method": "owlore", "settings": {"period": 4, "rank": 16, "scores": "outlier"}, "steps": 8,
            "train_loss_first": 2.9, "train_loss_last": 2.2, "eval_loss_before": 3.0, "eval_loss_after": after,
            "tokens_per_second": 104.0, "peak_bytes_measured": 31 * MB, "peak_bytes_planned": 20 * MB,
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
