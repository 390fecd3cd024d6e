"""Runs of the command line on a card whose tensor cores have no bfloat16, told as JSON: python -m device.on_an_old_card

The card's capability, `SIM_CAPABILITY=75`, is in the environment before Python starts.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from device.simulated import Order, drain, faults, set_order
from device.simulation import SimulatedDevice
from device.small_model import save_small_model, small_command
from lisa_kernels.cli import main

METHODS = ("owlore", "lisa")


def told() -> dict[str, Any]:
    """Return what came of each run: exit code, what was said, and the summary."""
    found: dict[str, Any] = {"capability": torch.cuda.get_device_capability()}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        save_small_model(folder)
        for method in METHODS:
            found[method] = _run(folder, folder / method, "--dtype", "auto", "--steps", "6", method=method)
        found["bf16"] = _run(folder, folder / "bf16", "--dtype", "bf16", method="lisa")
    drain()
    return {**found, "faults": [str(note) for note in faults]}


def _run(folder: Path, output: Path, *more: str, method: str) -> dict[str, Any]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(small_command(folder, output, *more, method=method))
    summary = output / "summary.json"
    whole = json.loads(summary.read_text()) if summary.exists() else {}
    kept = {name: whole.get(name) for name in ("eval_loss_before", "eval_loss_after", "skipped_steps")}
    config = output / "config.json"
    dtype = json.loads(config.read_text()).get("dtype") if config.exists() else None
    return {"code": code, "said": said.getvalue(), "dtype": dtype, **kept}


if __name__ == "__main__":
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    set_order(Order.LATE)
    with SimulatedDevice():
        json.dump(told(), sys.stdout)
