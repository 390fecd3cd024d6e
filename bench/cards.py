"""The steps of an 8B model as `plan` predicts them on three cards, by part, ours beside peft's LoRA.

One row of 1024 tokens in bfloat16, all blocks recomputed, layers drawn as deep as a draw is on average. No card has
confirmed any of it. Rows that exist are not made again.

    python -m bench.cards             # what is missing, then the table into bench/README.md and the picture beside it
    python -m bench.cards --report    # table and picture alone
"""

from __future__ import annotations

import argparse
from typing import Any

from bench.model_step_entries import LORA, Entry, parse_entries
from bench.plots import plot_card_steps
from bench.readme import markdown, put
from bench.rows import RESULTS, append_row, read_rows
from bench.step_cases import Case
from lisa_kernels import FullFineTune
from lisa_kernels.plan.cards import card_bytes
from lisa_kernels.plan.duration import predict
from lisa_kernels.plan.gpu_memory import GpuMemory
from lisa_kernels.plan.machines import CARDS
from lisa_kernels.plan.rehearsal import Workload
from lisa_kernels.plan.result import Plan
from lisa_kernels.plan.work import WorkLog
from lisa_kernels.sizes import gb

ROWS, MODEL = "cards", "preset:llama-3.1-8b"
CASE = Case(layers=32, rank=128, active_layers=5, lora_rank=16, galore_rank=32)
NAMES = ("owlore-frozen", "lora", "galore", LORA)
CARD_NAMES = ("rtx-3090", "rtx-4090", "a100")


def rows_of(entry: Entry) -> list[dict[str, Any]]:
    """Return a row for each card."""
    work, workload = WorkLog(), entry.asked(Workload(MODEL, FullFineTune()))
    gpu = GpuMemory.here()
    plan = Plan(workload, entry.planned(workload, gpu, work))
    found = []
    for name in CARD_NAMES:
        card = CARDS[name]
        said = predict(work, workload, card, workload.method.get("period", None))
        found.append(
            {
                "model": MODEL, "name": entry.name, "method": entry.title, "card": name,
                "peak_bytes": plan.allocated_bytes, "fits": plan.fits(card_bytes(card.memory_gb), expandable=True),
                **said.as_dict(),
            }
        )  # fmt: skip
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table: seconds of a step and tokens a second on each card, and where they go on one."""
    latest = {(row["name"], row["card"]): row for row in rows}
    lines = []
    for name in NAMES:
        mine = [latest[name, card] for card in CARD_NAMES]
        middle = mine[1]
        whole = sum(sum(ends) for ends in middle["parts"].values())
        shares = ", ".join(f"{part} {sum(ends) / whole:.0%}" for part, ends in middle["parts"].items())
        lines.append([
            middle["method"] if name == LORA else f"`{name}`", gb(middle["peak_bytes"]),
            *("{:.2f}-{:.2f} s".format(row["step_seconds_low"], row["step_seconds_high"]) for row in mine),
            "{:,.0f}-{:,.0f}".format(middle["tokens_per_second_low"], middle["tokens_per_second_high"]), shares,
            f"{middle['launches']:,}",
        ])  # fmt: skip
    head = ["", "peak", *CARD_NAMES, f"tokens/s, {CARD_NAMES[1]}", f"parts, {CARD_NAMES[1]}", "launches"]
    return markdown(head, lines)


def main() -> None:
    """Make what is missing, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write what the rows that exist say")
    known = {row["name"] for row in read_rows(ROWS)}
    if not parser.parse_args().report:
        for entry in parse_entries(",".join(NAMES), CASE):
            for row in rows_of(entry) if entry.name not in known else []:
                append_row(ROWS, row)
                print(row, flush=True)
    put("cards", table(read_rows(ROWS)))
    plot_card_steps(read_rows(ROWS), RESULTS / "cards.png")


if __name__ == "__main__":
    main()
