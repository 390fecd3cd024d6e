"""What packing wastes, and what attention by segments saves: one batch of packed rows, with borders and under a mask.

float32, one thread; seconds are the process's own, forward and backward, the two ways in turns, and peaks are those of
tensors, by plan, of a step of full fine-tuning without recomputation.

    python -m bench.packing --data DATA.jsonl --model sample:smollm2-135m
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from bench.readme import markdown
from lisa_kernels import FullFineTune
from lisa_kernels.layers import attend_by_segments
from lisa_kernels.plan.data_rows import DataRows
from lisa_kernels.plan.rehearsal import Workload, rehearse
from lisa_kernels.plan.work import WorkLog
from lisa_kernels.train.models import load_model
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.packing import collate, collate_flat
from lisa_kernels.train.prepare import read_data
from lisa_kernels.train.tokenize import TokenizedData, packed

LENGTHS, TIMED, BATCH, ROUNDS = (512, 640, 1024, 2048), (512, 2048), 1, 3


def seconds(model: torch.nn.Module, batch: dict[str, Tensor]) -> float:
    """Return the process's seconds for a loss and its gradients."""
    model.zero_grad()
    begin = time.process_time()
    model(**batch, use_cache=False).loss.backward()
    return time.process_time() - begin


def times(name: str, rows: TokenizedData) -> tuple[float, float]:
    """Return the median seconds of one batch (by segments, under a mask)."""
    given = [rows[index] for index in range(BATCH)]
    models = [load_model(name, torch.float32, seed=0).train() for _ in range(2)]
    if not attend_by_segments(models[0], DataRows.of(rows.rows).longest):
        raise SystemExit(f"{name} does not attend by segments.")
    ways = list(zip(models, (collate_flat(given), collate(given, 0))))
    taken = [[seconds(model, batch) for model, batch in ways] for _ in range(ROUNDS)]
    by_segments, masked = (statistics.median(each) for each in zip(*taken))
    return by_segments, masked


def planned(name: str, rows: TokenizedData, seq_len: int) -> tuple[int, int]:
    """Return (peak bytes, multiplications and additions of attention in a step) by plan."""
    asked = Workload(
        name, FullFineTune(), batch_size=BATCH, seq_len=seq_len, dtype="fp32", gradient_checkpointing=False,
        data=DataRows.of(rows.rows),
    )  # fmt: skip
    work = WorkLog()
    rehearse(asked, work=work)
    found = [(work.operations[key], n) for (phase, _, key), n in work.counts.items() if phase.startswith("step 2:")]
    attention = sum(op.products * n for op, n in found if op is not None and "attention" in str(op.key[0]))
    return rehearse(asked).peak_bytes, attention


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="sample:smollm2-135m")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    options = FineTuneOptions(model=asked.model, data=asked.data, output=Path(), eval_fraction=0.0)
    lines = []
    for length in LENGTHS:
        read = read_data(dataclasses.replace(options, seq_len=length), Console(file=io.StringIO()))
        rows = packed(read.train, length)
        line = [str(length), f"{len(rows):,}", f"{rows.empty_share(length):.2%}"]
        if length in TIMED:
            by_segments, masked = times(asked.model, rows)
            peak, products = planned(asked.model, rows, length)
            line += [f"{by_segments:.2f}", f"{masked:.2f}", f"{by_segments / masked:.2f}", f"{peak / 1e9:.2f}",
                     f"{products / 1e9:.2f}"]  # fmt: skip
        lines.append([*line, *["", "", "", "", ""][len(line) - 3 :]])
    names = ["tokens a row", "rows", "empty", "by segments, s", "under a mask, s", "ratio", "planned peak, GB",
             "attention, 10⁹"]  # fmt: skip
    print(markdown(names, lines))


if __name__ == "__main__":
    main()
