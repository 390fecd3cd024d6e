"""The table of README.md by which a person chooses a method: what was measured of each, every figure from a row."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.pretrained_table import BEFORE, counted_rows
from bench.pretrained_tasks import FIRST_FIT, FULL_ROWS, Size
from bench.quality_table import best_rows
from bench.readme import markdown
from bench.rows import read_rows

README = Path(__file__).parents[1] / "README.md"
SEEDS = (0, 1, 2)
Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One line: a title, and the names under which the benchmarks have the method; "" where they do not."""

    title: str
    pretrained: str = ""
    quality: str = ""
    memory: str = ""
    step: str = ""


CHOICES = (
    Choice("torch AdamW, all weights", "full fine-tuning, torch AdamW fp32", "full fine-tuning, torch AdamW fp32",
           "torch-full", "torch-full"),
    Choice("peft LoRA, r = 16", "peft LoRA r = 16", "peft LoRA r = 16, all-linear", "peft-lora", "peft-lora"),
    Choice("**LoRA, r = 16, embeddings low-rank**", 'LoRA(rank=16, embeddings="low-rank")',
           'LoRA(rank=16, embeddings="low-rank")', "lora"),
    Choice("GaLore, r = 32, embeddings low-rank", 'GaLore(rank=32, embeddings="low-rank")',
           "GaLore(rank=32, gap=50)", "galore-32"),
    Choice("OwLore, two thirds of the layers, r = 32", "OwLore(20, period=3, rank=32)", "", "owlore-wide"),
    Choice("OwLore, 5 layers, r = 128 (2 M: 4, r = 32)", "OwLore(5, period=5, rank=128)",
           'OwLore(4, 10, rank=32, embeddings="low-rank")', "owlore-low-rank", "owlore-low-rank"),
    Choice("LISA, 2 layers", "LISA(2, period=6)", "LISA(2, 10)", "lisa"),
    Choice("FullFineTune", "FullFineTune()", "FullFineTune()", "full"),
    Choice("LoRA-FA", "LoRAFA(rank=32, alpha=64)", "LoRAFA(rank=32, alpha=64)", "lora-fa", "lora-fa"),
    Choice("BAdam", "BAdam(period=2)", "BAdam(10)", "badam-ours"),
)  # fmt: skip


def choice_table() -> str:
    """Return the Markdown table; a dash stands where nothing was measured."""
    # Those packed as the package packs now, and those before: what was there before training depends on neither.
    pretrained, older = (
        [
            row
            for row in read_rows("pretrained")
            if row["task"] == "gsm8k" and Size(packed=packed).key().items() <= row.items()
        ]
        for packed in (FULL_ROWS, FIRST_FIT)
    )
    quality, memory, step = (read_rows(name) for name in ("quality", "memory", "step"))
    known = [row["known_loss"] for row in older if row["contestant"] == BEFORE]
    before = [row["answer_loss"] for row in older if row["contestant"] == BEFORE]
    lines = [
        [
            choice.title, _mean(counted_rows(pretrained, choice.pretrained, SEEDS), "answer_loss", 3),
            _mean(counted_rows(pretrained, choice.pretrained, SEEDS), "known_loss", 2),
            _mean(best_rows(quality, choice.quality, SEEDS), "eval_loss", 3), _peak(memory, choice.memory),
            _ratio(step, choice.step),
        ]
        for choice in CHOICES
    ]  # fmt: skip
    was = f" ({before[-1]:.3f} before)" if before else ""
    knew = f" ({known[-1]:.2f} before)" if known else ""
    domain = f" ({quality[-1]['eval_loss_before']:.3f} before)" if quality else ""
    head = [
        "method", f"pretrained 135 M: loss{was}", f"of what it knew{knew}", f"new domain, 2 M: loss{domain}",
        "Llama-2-7B: peak", "step time",
    ]  # fmt: skip
    return markdown(head, lines)


def _mean(rows: list[Row], name: str, digits: int) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{statistics.mean(values):.{digits}f}" if values else "-"


def _peak(rows: list[Row], name: str) -> str:
    mine = [row for row in rows if (row["name"], row["model"]) == (name, "llama-2-7b") and row["planned_bytes"]]
    return f"{mine[-1]['planned_bytes'] / 1e9:.1f} GB" if mine else "-"


def _ratio(rows: list[Row], name: str) -> str:
    mine = [row for row in rows if row["name"] == name and row.get("ratio_to_full") is not None]
    return f"{mine[-1]['ratio_to_full']:.2f}×" if mine else "-"
