"""How well each method learns: held-out loss on the same data and token budget, beside torch AdamW and peft LoRA.

A small base model is trained on the standard library's code; every method then fine-tunes it on the library's
docstrings (English). The learning rate of each method is the best on seed 0 of a grid of factors of two that grows
while its best stands at an edge; two more seeds follow at that rate. Each run is a row; rows that exist are not run
again.

    python -m bench.quality            # runs what is missing, then prints the table and writes it into bench/README.md
    python -m bench.quality --only LISA --only BAdam   # some of them; several processes may share the rows
    python -m bench.quality --report   # only the table
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.quality_table import report
from bench.rows import append_row, read_rows
from lisa_kernels import LISA, OWS, BAdam, FullFineTune, GaLore, LoRA, LoRAFA, OwLore, attach
from lisa_kernels.methods import Method
from lisa_kernels.train.models import load_model, load_tokenizer
from lisa_kernels.train.records import load_records
from lisa_kernels.train.tokenize import TokenizedData, collate, pad_token_id, split_records, tokenize_records
from lisa_kernels.train.trainer import held_out_loss

BASE = Path(__file__).parents[1] / "runs" / "quality-base"
SEEDS = (0, 1, 2)
STEPS, BATCH, SEQ_LEN = 150, 8, 128
BASE_STEPS, BASE_BATCH, BASE_LR = 600, 8, 4e-3
MAX_GROWTH = 2


@dataclass(frozen=True)
class Contestant:
    """One line of the table: how to train, and the learning rates to begin with."""

    name: str
    start: Callable[[nn.Module, float, int, list[dict[str, Tensor]]], torch.optim.Optimizer]
    rates: tuple[float, float, float]


def _attached(method: Method) -> Any:
    def start(model: nn.Module, lr: float, seed: int, calibration: list[dict[str, Tensor]]) -> torch.optim.Optimizer:
        return attach(model, method, lr=lr, seed=seed, calibration=calibration)

    return start


def _torch_adamw(model: nn.Module, lr: float, seed: int, calibration: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)


def _peft_lora(model: nn.Module, lr: float, seed: int, calibration: Any) -> torch.optim.Optimizer:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    # peft wraps the linears inside `model` itself, so the same object is trained.
    get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)


MIDDLE, HIGH = (2e-3, 4e-3, 8e-3), (5e-3, 1e-2, 2e-2)
CONTESTANTS = (
    Contestant("full fine-tuning, torch AdamW fp32", _torch_adamw, MIDDLE),
    Contestant("FullFineTune()", _attached(FullFineTune()), MIDDLE),
    Contestant(
        'OwLore(4, 10, rank=32, embeddings="always")', _attached(OwLore(4, 10, rank=32, embeddings="always")), MIDDLE
    ),
    Contestant(
        'OwLore(4, 10, rank=32, embeddings="low-rank")',
        _attached(OwLore(4, 10, rank=32, embeddings="low-rank")),
        MIDDLE,
    ),
    Contestant(
        'OwLore(4, 10, rank=32, embeddings="frozen")', _attached(OwLore(4, 10, rank=32, embeddings="frozen")), MIDDLE
    ),
    Contestant("OWS(2, 10)", _attached(OWS(2, 10)), MIDDLE),
    Contestant("LISA(2, 10)", _attached(LISA(2, 10)), MIDDLE),
    Contestant("GaLore(rank=32, gap=50)", _attached(GaLore(rank=32, gap=50, scale=1.0)), MIDDLE),
    Contestant("LoRA(rank=16)", _attached(LoRA(rank=16)), HIGH),
    Contestant('LoRA(rank=16, embeddings="low-rank")', _attached(LoRA(rank=16, embeddings="low-rank")), HIGH),
    Contestant("LoRAFA(rank=32, alpha=64)", _attached(LoRAFA(rank=32, alpha=64.0)), HIGH),
    Contestant("peft LoRA r = 16, all-linear", _peft_lora, HIGH),
    Contestant("BAdam(10)", _attached(BAdam(10)), MIDDLE),
)


@dataclass(frozen=True)
class Data:
    """Tokenised rows and what turns them into batches."""

    train: TokenizedData
    held_out: TokenizedData
    pad: int
    loss_before: float = float("nan")

    def batches(self, batch: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """Yield shuffled batches without end."""
        order = random.Random(f"batches:{seed}")
        while True:
            indices = list(range(len(self.train)))
            order.shuffle(indices)
            for start in range(0, len(indices) - batch + 1, batch):
                yield collate([self.train[i] for i in indices[start : start + batch]], self.pad)

    def held_out_batches(self) -> list[dict[str, Tensor]]:
        """Return the held-out rows as batches."""
        rows = [self.held_out[i] for i in range(len(self.held_out))]
        return [collate(rows[start : start + 32], self.pad) for start in range(0, len(rows), 32)]


def _data(spec: str, tokenizer: Any, eval_fraction: float) -> Data:
    records = load_records(spec)
    train, held_out = split_records(records, eval_fraction, seed=0)
    return Data(
        tokenize_records(train, tokenizer, SEQ_LEN),
        tokenize_records(held_out, tokenizer, SEQ_LEN),
        pad_token_id(tokenizer),
    )


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[dict[str, Tensor]], steps: int, device: str
) -> tuple[float, int]:
    """Train with a linear schedule and clipping at 1; returns seconds per step and the most bytes of state held."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    model.train()
    begin, most = time.perf_counter(), 0
    for step in range(steps):
        batch = {name: value.to(device) for name, value in next(batches).items()}
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
        most = max(most, sum(value.numel() * value.element_size() for value in state))
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"  step {step + 1}/{steps}", flush=True)
    return (time.perf_counter() - begin) / steps, most


def base_model(device: str) -> None:
    """Train the base model once and keep it on disk."""
    if (BASE / "config.json").exists():
        return
    print(f"training the base model: {BASE_STEPS} steps on stdlib:code", flush=True)
    model = load_model("preset:tiny", torch.float32, 0)
    texts = [*load_records("stdlib:code").texts(), *load_records("stdlib:docstrings").texts()]
    tokenizer = load_tokenizer("preset:tiny", texts, model.config.vocab_size)
    data = _data("stdlib:code", tokenizer, 0.02)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LR, weight_decay=0.01)
    train(model, optimizer, data.batches(BASE_BATCH, 0), BASE_STEPS, device)
    print(f"base: held-out loss on code {held_out_loss(model, data.held_out_batches()):.4f}", flush=True)
    tokenizer.save_pretrained(BASE)
    model.cpu().save_pretrained(BASE)


def run(contestant: Contestant, lr: float, seed: int, data: Data, device: str) -> dict[str, Any]:
    """Fine-tune the base once; returns the row."""
    model = load_model(str(BASE), torch.float32, 0).to(device)
    calibration = [
        {k: v.to(device) for k, v in batch.items()} for batch, _ in zip(data.batches(BATCH, seed), range(16))
    ]
    optimizer = contestant.start(model, lr, seed, calibration)
    seconds, state = train(model, optimizer, data.batches(BATCH, seed), STEPS, device)
    return {
        "contestant": contestant.name, "lr": lr, "seed": seed, "steps": STEPS, "batch": BATCH, "seq_len": SEQ_LEN,
        "base_steps": BASE_STEPS, "eval_loss_before": data.loss_before,
        "eval_loss": held_out_loss(model, data.held_out_batches()),
        "seconds_per_step": seconds, "peak_state_bytes": state,
    }  # fmt: skip


def measure(contestant: Contestant, data: Callable[[], Data], device: str) -> None:
    """Run what is missing of one contestant: the grid on seed 0, then the other seeds at the best rate."""

    def loss(lr: float, seed: int) -> float:
        for row in read_rows("quality"):
            same = row["contestant"] == contestant.name and row["steps"] == STEPS and row["base_steps"] == BASE_STEPS
            if same and row["seed"] == seed and abs(row["lr"] / lr - 1) < 1e-6:
                return float(row["eval_loss"])
        row = run(contestant, lr, seed, data(), device)
        append_row("quality", row)
        print(
            f"{contestant.name}: lr {lr:g}, seed {seed}: {row['eval_loss']:.4f} ({row['seconds_per_step']:.3f} s/step)",
            flush=True,
        )
        return float(row["eval_loss"])

    rates = {lr: loss(lr, SEEDS[0]) for lr in contestant.rates}
    for _ in range(MAX_GROWTH):
        best = min(rates, key=rates.__getitem__)
        if best == max(rates):
            rates[best * 2] = loss(best * 2, SEEDS[0])
        elif best == min(rates):
            rates[best / 2] = loss(best / 2, SEEDS[0])
    best = min(rates, key=rates.__getitem__)
    for seed in SEEDS[1:]:
        loss(best, seed)


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only print the table from the rows that exist")
    parser.add_argument("--only", action="append", help="only contestants whose name holds this")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    if not arguments.report:
        base_model(arguments.device)
        tokenizer = load_tokenizer(str(BASE), [], 0)

        @functools.cache
        def data() -> Data:
            found = _data("stdlib:docstrings", tokenizer, 0.05)
            model = load_model(str(BASE), torch.float32, 0).to(arguments.device)
            return dataclasses.replace(found, loss_before=held_out_loss(model, found.held_out_batches()))

        for contestant in CONTESTANTS:
            if not arguments.only or any(part in contestant.name for part in arguments.only):
                measure(contestant, data, arguments.device)
    report([contestant.name for contestant in CONTESTANTS], SEEDS)


if __name__ == "__main__":
    main()
