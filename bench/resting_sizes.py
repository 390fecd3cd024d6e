"""What a pretrained model loses, before it trains, in each way to rest; sizes are filled by measured losses.

SmolLM2-135M-Instruct answers held-out questions of `bench.pretrained_tasks` with its matrices at rest: in NF4, in the
bytes of "mixed" and half of what those are more, in int8. A size is filled by what four of the task's training rows
say, and by what is known without data. Rows that exist are not run again.

    python -m bench.resting_sizes --data FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.pretrained_tasks import BASE, Size, Task, read_task
from bench.rows import append_row, environment, read_rows
from lisa_kernels import LoRA, attach
from lisa_kernels.layers import RestingLinear
from lisa_kernels.train.models import load_model

ROWS = "resting_sizes"
DATA, PLACE = "training rows", "place"


def run(task: Task, resting: str | None, filled_by: str | None, asked: int) -> dict[str, Any]:
    """Return the row of one way to rest: the loss of `asked` held-out answers, and the bytes of what rests."""
    model = load_model(BASE, torch.float32, 0)
    model.config.use_cache = False
    if resting is not None:
        batches = [batch for batch, _ in zip(task.batches(0), range(4))] if filled_by == DATA else None
        # New adapters add nothing.
        attach(model, LoRA(rank=8), resting=resting, calibration=batches)
    loss, _ = task.answer_loss(model, asked)
    return {"resting": resting, "filled_by": filled_by, "asked": asked, "loss": loss, "bytes": resting_bytes(model)}


def resting_bytes(model: nn.Module) -> int:
    """Return the bytes of all codes and scales."""
    layers = [module for module in model.modules() if isinstance(module, RestingLinear)]
    return sum(layer.codes.nbytes + layer.scales.nbytes for layer in layers)


def main() -> None:
    """Run what is missing, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' files")
    parser.add_argument("--asked", type=int, default=96, help="held-out answers (default: %(default)s)")
    given = parser.parse_args()
    task = read_task("gsm8k", given.data, Size())

    def row(resting: str | None, filled_by: str | None = None) -> dict[str, Any]:
        wanted = {"resting": resting, "filled_by": filled_by, "asked": given.asked}
        for known in read_rows(ROWS):
            if all(known[key] == value for key, value in wanted.items()):
                return known
        made = {**run(task, resting, filled_by, given.asked), "environment": environment()}
        append_row(ROWS, made)
        return made

    rows = [row(way) for way in (None, "nf4", "mixed", "int8")]
    _, nf4, mixed, _ = (each["bytes"] for each in rows)
    for size in (mixed, (nf4 + mixed) // 2):
        rows += [row(str(size), filled_by) for filled_by in (DATA, PLACE)]
    for each in rows:
        more = each["loss"] - rows[0]["loss"]
        filled_by = "" if each["filled_by"] is None else f", by {each['filled_by']}"
        print(
            f"{each['resting'] or '16-bit'}{filled_by}: {each['bytes'] / 1e6:.1f} MB, {each['loss']:.4f}, {more:+.4f}"
        )


if __name__ == "__main__":
    main()
