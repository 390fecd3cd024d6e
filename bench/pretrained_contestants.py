"""Who takes part in the comparison on a pretrained model: the methods of this package, and what people use instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels import LISA, OWS, BAdam, FullFineTune, GaLore, LoRA, LoRAFA, OwLore, attach
from lisa_kernels.methods import Method

WEIGHT_DECAY = 0.01
Start = Callable[[nn.Module, float, int, Iterable[dict[str, Tensor]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Contestant:
    """One line of the table: how a model is prepared for training, and the learning rates to begin with."""

    name: str
    start: Start
    rates: tuple[float, ...]
    method: Method | None = None

    @property
    def is_peer(self) -> bool:
        """Whether it is somebody else's."""
        return self.method is None


def ours(name: str, method: Method, *rates: float) -> Contestant:
    """Return a method of this package as a contestant."""

    def start(
        model: nn.Module, lr: float, seed: int, calibration: Iterable[dict[str, Tensor]]
    ) -> torch.optim.Optimizer:
        return attach(model, method, lr=lr, seed=seed, weight_decay=WEIGHT_DECAY, calibration=calibration)

    return Contestant(name, start, rates, method)


def _torch_adamw(model: nn.Module, lr: float, seed: int, calibration: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)


def _as_it_is(model: nn.Module, lr: float, seed: int, calibration: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def peft_lora(name: str, *rates: float, **settings: Any) -> Contestant:
    """Return peft's LoRA on all linear layers as a contestant, torch's AdamW on its factors."""

    def start(model: nn.Module, lr: float, seed: int, calibration: Any) -> torch.optim.Optimizer:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        # peft wraps the linears inside `model` itself, so the same object is trained.
        get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **settings))
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=WEIGHT_DECAY)

    return Contestant(name, start, rates)


CONTESTANTS = (
    Contestant("before training", _as_it_is, (0.0,)),
    Contestant("full fine-tuning, torch AdamW fp32", _torch_adamw, (5e-5, 1e-4, 2e-4)),
    peft_lora("peft LoRA r = 16", 5e-4, 1e-3, 2e-3, 4e-3, r=16, lora_alpha=32),
    peft_lora("peft LoRA r = 64", 1e-3, 2e-3, r=64, lora_alpha=128),
    peft_lora("peft rsLoRA r = 64", 5e-4, 1e-3, r=64, lora_alpha=32, use_rslora=True),
    peft_lora("peft DoRA r = 16", 2e-3, r=16, lora_alpha=32, use_dora=True),
    ours("LoRA(rank=16)", LoRA(rank=16), 1e-3),
    ours('LoRA(rank=16, embeddings="low-rank")', LoRA(rank=16, embeddings="low-rank"), 5e-4, 1e-3),
    ours(
        'GaLore(rank=32, embeddings="low-rank")', GaLore(rank=32, scale=1.0, embeddings="low-rank"), 2.5e-4, 5e-4
    ),
    ours('GaLore(rank=32, embeddings="frozen")', GaLore(rank=32, scale=1.0, embeddings="frozen"), 5e-4),
    ours('GaLore(rank=8, embeddings="low-rank")', GaLore(rank=8, scale=1.0, embeddings="low-rank"), 7e-4),
    ours("OwLore(5, period=5, rank=128)", OwLore(5, 5, rank=128), 5e-4, 1e-3),
    ours("OwLore(10, period=6, rank=32)", OwLore(10, 6, rank=32), 1e-3),
    ours("OwLore(5, period=50, rank=128), as published", OwLore(5, 50, rank=128, embeddings="always"), 1e-3),
    ours("LISA(2, period=6)", LISA(2, 6), 5e-4),
    ours("OWS(2, period=6)", OWS(2, 6), 5e-4),
    ours("BAdam(period=2)", BAdam(2), 5e-4),
    ours("LoRAFA(rank=32, alpha=64)", LoRAFA(rank=32, alpha=64.0), 4e-3),
    ours("FullFineTune()", FullFineTune(), 2e-4),
)  # fmt: skip
