"""What carrying the moments into a new basis is worth: the same training with it, without it, and starting afresh.

Called by `python -m bench.basis ablation`: a Llama of 4 layers, 64 wide, learns the bytes of the standard library's
code from the start with GaLore(rank=8); every variant sees the same batches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.rows import append_row, read_rows
from lisa_kernels import GaLore, attach
from lisa_kernels.layers import LowRankLinear
from lisa_kernels.methods import SampledAdamW

SEEDS = (0, 1, 2, 3)
STEPS, BATCH, SEQ_LEN, RANK, LR, GAP = 200, 8, 64, 8, 1e-2, 10


def carry(optimizer: SampledAdamW, layer: LowRankLinear) -> None:
    """Leave the step to carry the moments."""


def keep(optimizer: SampledAdamW, layer: LowRankLinear) -> None:
    """Leave the moments as they are: coordinates of the old basis are read as ones of the new."""
    assert layer.tracker is not None
    layer.tracker.rotation = None


def reset(optimizer: SampledAdamW, layer: LowRankLinear) -> None:
    """Begin again with moments of zero."""
    keep(optimizer, layer)
    optimizer.retire([layer.slot])


@dataclass(frozen=True)
class Variant:
    """What is done to the moments of a basis that is refreshed every `gap` steps."""

    name: str
    gap: int
    at_refresh: Callable[[SampledAdamW, LowRankLinear], None]


VARIANTS = (
    Variant("never refreshed", 0, carry),
    Variant("moments carried", GAP, carry),
    Variant("moments kept as they are", GAP, keep),
    Variant("moments reset", GAP, reset),
)


def text() -> Tensor:
    """Return the first two million bytes of the standard library's code as int64."""
    from lisa_kernels.train.records import load_records

    data = "\n".join(load_records("stdlib:code", max_bytes=2_000_000).texts()).encode()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def batches(data: Tensor, rows: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield windows at random places, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - SEQ_LEN, (rows, 1), generator=generator)
        ids = data[starts + torch.arange(SEQ_LEN)]
        yield {"input_ids": ids, "labels": ids}


def small_llama(seed: int) -> nn.Module:
    """Return a Llama over bytes with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=256, max_position_embeddings=SEQ_LEN, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model: nn.Module = LlamaForCausalLM(config)
    return model


def watched(variant: Variant, model: nn.Module, seed: int) -> SampledAdamW:
    """Attach GaLore, with a hook before its step that does what the variant says."""
    optimizer = attach(model, GaLore(rank=RANK, gap=variant.gap, scale=1.0), lr=LR, seed=seed)
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    for layer in layers:
        assert layer.tracker is not None
        # Repeated attempts, which change nothing here, would count as refreshes below.
        layer.tracker.early = False

    def before(*_: Any) -> None:
        for layer in layers:
            if layer.tracker is not None and layer.tracker.rotation is not None:
                variant.at_refresh(optimizer, layer)

    optimizer.register_step_pre_hook(before)
    return optimizer


def run(variant: Variant, seed: int, data: Tensor) -> dict[str, Any]:
    """Train once on the first nine tenths of the data; returns the row, with the loss on the rest."""
    model = small_llama(seed)
    optimizer = watched(variant, model, seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / STEPS)
    border = len(data) * 9 // 10
    begin = time.process_time()
    for _, batch in zip(range(STEPS), batches(data[:border], BATCH, seed)):
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        held_out = zip(range(8), batches(data[border:], 64, seed=99))
        losses = [float(model(**batch, use_cache=False).loss) for _, batch in held_out]
    return {
        "case": "ablation", "variant": variant.name, "gap": variant.gap, "seed": seed, "rank": RANK, "lr": LR,
        "steps": STEPS, "eval_loss": statistics.fmean(losses), "cpu_seconds": time.process_time() - begin,
    }  # fmt: skip


def ablation(record: bool) -> list[dict[str, Any]]:
    """Return a row for every variant with the mean loss over the seeds; runs recorded already are not run again."""
    known = {(row["variant"], row["gap"], row["seed"]): row for row in read_rows("basis") if row["case"] == "ablation"}
    data = text()
    losses: dict[Variant, list[float]] = {variant: [] for variant in VARIANTS}
    for seed in SEEDS:
        for variant in VARIANTS:
            row = known.get((variant.name, variant.gap, seed))
            if row is None:
                row = run(variant, seed, data)
                if record:
                    append_row("basis", row)
            losses[variant].append(row["eval_loss"])
            print(f"  {variant.name}, gap {variant.gap}, seed {seed}: {row['eval_loss']:.4f}", flush=True)
    return [
        {"variant": variant.name, "gap": variant.gap, "mean": statistics.fmean(found), "losses": found}
        for variant, found in losses.items()
    ]
