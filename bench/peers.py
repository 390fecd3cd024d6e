"""Who takes part in the optimizer benchmark: `AdamW8bit` and the optimizers people use in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn
from torch.optim import Optimizer

from lisa_kernels import AdamW8bit
from lisa_kernels.errors import unknown_name

LR, WEIGHT_DECAY = 1e-5, 0.01
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Contestant:
    """One optimizer: how it is called and built, what it needs, and from where on a CPU takes seconds for a step."""

    name: str
    title: str
    package: str
    start: Callable[[list[nn.Parameter]], Optimizer]
    moment_bytes: float | None = None  # of both moments of one element, as an estimate; None: in the weight's dtype
    needs_cuda: bool = False
    most_elements_on_cpu: int | None = None
    most_tensors_on_cpu: int | None = None

    @property
    def is_peer(self) -> bool:
        """Whether it is somebody else's."""
        return self.package != "lisa_kernels"

    def unavailable(self, device: str) -> str | None:
        """Return why it cannot run here at all, or None."""
        if find_spec(self.package) is None:
            return f"not installed: pip install {self.package}"
        if self.needs_cuda and device != "cuda":
            return "needs CUDA"
        return None

    def too_slow(self, device: str, elements: int, tensors: int) -> str | None:
        """Return why one step would take seconds, or None; `elements` counts all tensors together."""
        if device != "cpu":
            return None
        if self.most_elements_on_cpu is not None and elements > self.most_elements_on_cpu:
            top = self.most_elements_on_cpu.bit_length() - 1
            return f"slow: up to 2^{top} (--no-limits)"
        if self.most_tensors_on_cpu is not None and tensors > self.most_tensors_on_cpu:
            return f"slow: up to {self.most_tensors_on_cpu:,} tensors (--no-limits)"
        return None


def _ours(rounding: str) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda params: AdamW8bit(params, lr=LR, weight_decay=WEIGHT_DECAY, rounding=rounding)


def _torch_fused(params: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)


def _torch_foreach(params: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, foreach=True)


def _class_of(module: str, name: str) -> Callable[[list[nn.Parameter]], Optimizer]:
    """Return how another package's class is built with its own defaults; it is imported only then."""

    def start(params: list[nn.Parameter]) -> Optimizer:
        optimizer: Optimizer = getattr(import_module(module), name)(params, lr=LR, weight_decay=WEIGHT_DECAY)
        return optimizer

    return start


def _flashoptim(params: list[nn.Parameter]) -> Optimizer:
    # It keeps 24 bits of a 16-bit weight unless told otherwise, and refuses to for 32-bit ones.
    bits = None if params[0].dtype == torch.float32 else 24
    build: Callable[..., Optimizer] = import_module("flashoptim").FlashAdamW
    return build(params, lr=LR, weight_decay=WEIGHT_DECAY, master_weight_bits=bits)


YARDSTICK = "torch-fused"
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("stochastic", "AdamW8bit", "lisa_kernels", _ours("stochastic"), 2.1),
        Contestant("nearest", "AdamW8bit, nearest rounding", "lisa_kernels", _ours("nearest"), 2.1),
        Contestant(YARDSTICK, "torch AdamW fused", "torch", _torch_fused),
        Contestant("torch-foreach", "torch AdamW foreach", "torch", _torch_foreach, most_elements_on_cpu=1 << 26),
        Contestant(
            "bitsandbytes", "bitsandbytes AdamW8bit", "bitsandbytes", _class_of("bitsandbytes.optim", "AdamW8bit"), 2.1,
            most_elements_on_cpu=1 << 24,
        ),
        # Compiles one kernel per tensor shape (about 10 s each on a CPU) and looks it up for every tensor.
        Contestant(
            "torchao", "torchao AdamW8bit", "torchao", _class_of("torchao.optim", "AdamW8bit"), 2.1,
            most_elements_on_cpu=1 << 20, most_tensors_on_cpu=100,
        ),
        Contestant("flashoptim", "FlashAdamW", "flashoptim", _flashoptim, 3.2, needs_cuda=True),
    )
}  # fmt: skip


def parse_peers(text: str) -> list[Contestant]:
    """Return ours and the peers that `text` names: `all`, `none` or names with commas; InputError for others."""
    peers = [name for name, contestant in CONTESTANTS.items() if contestant.is_peer]
    named = [name.strip() for name in text.split(",")]
    if named == ["all"]:
        named = peers
    elif named == ["none"]:
        named = []
    for name in named:
        if name not in peers:
            raise unknown_name("peer", name, [*peers, "all", "none"])
    return [contestant for name, contestant in CONTESTANTS.items() if name in named or not contestant.is_peer]
