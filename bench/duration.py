"""How well `plan` tells the time of a step: predicted from this machine's own speed, and then taken.

Five geometries by five methods, float32, one thread; clocks count the process's own seconds, so that a neighbour on the
machine matters little. Each pair is a row; those that exist are not taken again.

    python -m bench.duration             # what is missing, then the table into bench/README.md
    python -m bench.duration --report    # the table alone
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from bench.readme import markdown, put
from bench.rows import append_row, read_rows
from lisa_kernels import LISA, FullFineTune, GaLore, LoRA, OwLore
from lisa_kernels.methods import Method
from lisa_kernels.plan.rehearsal import Workload, empty_batch, prepare, rehearse
from lisa_kernels.plan.result import Plan
from lisa_kernels.plan.this_cpu import ThisCpu

ROWS = "duration"
STEPS, FIRST = 9, 2
GEOMETRIES: dict[str, dict[str, Any]] = {
    "llama 6 × 256": {"hidden_size": 256, "num_hidden_layers": 6, "vocab_size": 4096},
    "llama 4 × 512": {"hidden_size": 512, "num_hidden_layers": 4, "vocab_size": 8192},
    "llama 12 × 384": {"hidden_size": 384, "num_hidden_layers": 12, "vocab_size": 8192},
    "llama 4 × 768, wide vocabulary": {"hidden_size": 768, "num_hidden_layers": 4, "vocab_size": 49152},
    "llama 8 × 512, 1024 tokens a row": {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 4096},
}
METHODS: dict[str, Method] = {
    "FullFineTune()": FullFineTune(),
    "LISA(2)": LISA(2),
    "OwLore(2, rank=64)": OwLore(2, rank=64, scores="uniform"),
    "GaLore(rank=32), embeddings low-rank": GaLore(rank=32, embeddings="low-rank"),
    "LoRA(rank=16), embeddings low-rank": LoRA(rank=16, embeddings="low-rank"),
}


def workload(geometry: str, method: str) -> Workload:
    """Return the steps of one row; every other geometry recomputes its blocks."""
    from transformers import LlamaConfig

    sizes = GEOMETRIES[geometry]
    config = LlamaConfig(
        **sizes, intermediate_size=8 * sizes["hidden_size"] // 3 // 16 * 16, head_dim=64,
        num_attention_heads=sizes["hidden_size"] // 64, num_key_value_heads=sizes["hidden_size"] // 128,
        tie_word_embeddings=True,
    )  # fmt: skip
    rows, tokens = (1, 1024) if "1024" in geometry else (2, 256)
    again = list(GEOMETRIES).index(geometry) % 2 == 1
    return Workload(config, METHODS[method], rows, tokens, dtype="fp32", gradient_checkpointing=again)


def measured(asked: Workload) -> list[float]:
    """Return the seconds of real steps of the workload with the layers that a mean draw has."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(asked.model).train()
    model.config.use_cache = False
    optimizer, taken = prepare(model, asked, mean=True), []
    batch = empty_batch(asked, torch.device("cpu"))
    batch["input_ids"] = torch.randint_like(batch["input_ids"], asked.model.vocab_size)
    for _ in range(STEPS):
        begin = time.process_time()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.process_time() - begin)
    return taken[FIRST:]


def table(rows: list[dict[str, Any]]) -> str:
    """Return what was predicted for each, in what it took."""
    latest = {(row["geometry"], row["method"]): row["predicted_seconds"] / row["measured_seconds"] for row in rows}
    lines = [
        [geometry, *(f"{latest[geometry, method]:.2f}" if (geometry, method) in latest else "-" for method in METHODS)]
        for geometry in GEOMETRIES
    ]
    return markdown(["predicted / measured", *METHODS], lines)


def main() -> None:
    """Take what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the table from the rows that exist")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cpu, known = None, {(row["geometry"], row["method"]) for row in read_rows(ROWS)}
    for geometry in GEOMETRIES:
        for method in METHODS:
            if given.report or (geometry, method) in known:
                continue
            cpu, asked = cpu or ThisCpu(time.process_time), workload(geometry, method)
            step = Plan(asked, rehearse(asked)).duration(cpu).step
            row: dict[str, Any] = {
                "geometry": geometry, "method": method, "predicted_seconds": sum(step) / 2,
                "measured_seconds": statistics.median(measured(asked)),
            }  # fmt: skip
            append_row(ROWS, row)
            print(row, row["predicted_seconds"] / row["measured_seconds"], flush=True)
    put("duration", table(read_rows(ROWS)))
    print(table(read_rows(ROWS)))


if __name__ == "__main__":
    main()
