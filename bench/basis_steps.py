"""The longest step of a run over its median one: switches, first bases and refreshes must not stand out.

Called by `python -m bench.basis steps`; a Llama geometry of about 100 M parameters, batches of 4 × 256 random tokens.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from lisa_kernels import GaLore, OwLore, attach
from lisa_kernels.layers import LowRankLinear
from lisa_kernels.methods import Method

VOCABULARY, BATCH, SEQ_LEN = 8192, 4, 256
# Periods and gaps are short, so that few steps see several switches and refreshes.
METHODS: dict[str, tuple[Method, int]] = {
    "OwLore(5, period=8, rank=64, gap=20)": (
        OwLore(active_layers=5, period=8, rank=64, gap=20, scores="uniform", embeddings="frozen"),
        33,
    ),
    "GaLore(rank=64, gap=20)": (GaLore(rank=64, gap=20, embeddings="frozen"), 24),
}


def llama(layers: int = 12, width: int = 768, intermediate: int = 2048, heads: int = 12) -> nn.Module:
    """Return a Llama with random float32 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=VOCABULARY, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(config)
    return model


def timed_steps(
    model: nn.Module, method: Method, count: int, batch: int = BATCH, seq_len: int = SEQ_LEN
) -> list[dict[str, float]]:
    """Return for each step its seconds on the wall and on the CPU, and how many matrices found or refreshed a basis."""
    optimizer = attach(model, method, lr=1e-4)
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    generator = torch.Generator().manual_seed(0)
    found = []
    model.train()
    for _ in range(count):
        ids = torch.randint(VOCABULARY, (batch, seq_len), generator=generator)
        due = sum(layer.capturing for layer in layers)
        wall, cpu = time.perf_counter(), time.process_time()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "due": float(due)}
        print(f"  {step['seconds']:.2f} s, {step['cpu_seconds']:.2f} s of CPU, {due} bases", flush=True)
        found.append(step)
    return found


def steps() -> list[dict[str, Any]]:
    """Return a row for each method; the very first step, which also warms up, counts as any other."""
    rows = []
    for name, (method, count) in METHODS.items():
        print(name)
        taken = timed_steps(llama(), method, count)
        row: dict[str, Any] = {"case": "steps", "method": name, "steps": count}
        for clock in ("seconds", "cpu_seconds"):
            times = [step[clock] for step in taken]
            median = statistics.median(times)
            plain = statistics.median([step[clock] for step in taken if not step["due"]] or [median])
            row[clock] = {"median": median, "longest": max(times), "ratio": max(times) / median, "plain": plain}
        rows.append(row)
    return rows
