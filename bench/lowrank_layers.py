"""Forward and backward of one linear layer: trained, frozen, in low rank, and with adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from bench.held_bytes import saved_for_backward
from bench.lowrank_cases import BLOCKS, Case, OneLayer
from bench.timing import seconds_of_parts, spread
from lisa_kernels import GaLore, LoRAFA, attach

LEAST_ROUNDS, SECONDS_PER_LAYER = 3, 5.0
# Where torch's own 16-bit products would take minutes, they are timed on so many tokens.
FEW_TOKENS = 8


@dataclass(frozen=True)
class Contestant:
    """One form of the layer: how it is built on a weight, and whose it is."""

    name: str
    title: str
    build: Callable[[Case, Tensor], nn.Module]
    package: str = "lisa_kernels"

    def unavailable(self) -> str | None:
        """Return why it cannot run here, or None."""
        return None if find_spec(self.package) else f"not installed: pip install {self.package}"


@dataclass(frozen=True)
class LayerRow:
    """One form of one layer: numbers, or the reason why there are none.

    Ratios are of times and bytes per token. saved_bytes: what autograd keeps for the backward beside weights.
    """

    device: str
    dtype: str
    inputs: int
    outputs: int
    name: str
    layer: str
    settings: str
    part: str = "layer"
    reason: str | None = None
    tokens: int = 0
    rounds: int = 0
    forward_ms: float | None = None
    backward_ms: float | None = None
    backward_p20_ms: float | None = None
    backward_p80_ms: float | None = None
    saved_bytes: int | None = None
    backward_ratio_to_frozen: float | None = None
    backward_ratio_to_torch_frozen: float | None = None
    saved_ratio_to_torch_trained: float | None = None


def _trained(case: Case, weight: Tensor) -> nn.Module:
    return OneLayer(weight)


def _frozen_torch(case: Case, weight: Tensor) -> nn.Module:
    return OneLayer(weight).requires_grad_(False)


def low_rank(case: Case, weight: Tensor, gap: int) -> tuple[OneLayer, Any]:
    """Return the layer in low rank, as an attached GaLore trains it, and its optimizer."""
    model = OneLayer(weight)
    method = GaLore(case.rank, gap=gap, scale=1.0, embeddings="frozen")
    return model, attach(model, method, lr=1e-6, blocks=BLOCKS)


def _low_rank(case: Case, weight: Tensor) -> nn.Module:
    """Return the layer with a basis: the first step has found it."""
    model, optimizer = low_rank(case, weight, 0)
    x = case.numbers(case.rank, case.inputs)
    (model(x) * case.numbers(case.rank, case.outputs)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


def _frozen(case: Case, weight: Tensor) -> nn.Module:
    """Return the layer as it is in an attached model while others train."""
    model, _ = low_rank(case, weight, 0)
    model.layer.deactivate()
    # Without the model, whose hook would give the slot its gradient back.
    return model.blocks[0].requires_grad_(False)


def _lora_fa(case: Case, weight: Tensor) -> nn.Module:
    model = OneLayer(weight)
    attach(model, LoRAFA(case.lora_rank, 2.0 * case.lora_rank), lr=1e-6)
    return model


def _peft_lora(case: Case, weight: Tensor) -> nn.Module:
    peft = import_module("peft")
    config = peft.LoraConfig(r=case.lora_rank, lora_alpha=2 * case.lora_rank, target_modules=["0.0"])
    model: nn.Module = peft.get_peft_model(OneLayer(weight), config)
    return model


def _peft_lora_fa(case: Case, weight: Tensor) -> nn.Module:
    """Return peft's layer with its A frozen, as its LoRA-FA optimizer leaves it."""
    model = _peft_lora(case, weight)
    for name, param in model.named_parameters():
        if "lora_A" in name:
            param.requires_grad_(False)
    return model


TRAINED, TORCH_FROZEN, FROZEN = "torch-trained", "torch-frozen", "frozen"
CONTESTANTS = (
    Contestant(TRAINED, "nn.Linear, trained", _trained, "torch"),
    Contestant(TORCH_FROZEN, "nn.Linear, frozen", _frozen_torch, "torch"),
    Contestant(FROZEN, "ours, frozen", _frozen),
    Contestant("low-rank", "ours, low rank", _low_rank),
    Contestant("lora-fa", "ours, LoRA-FA", _lora_fa),
    Contestant("peft-lora", "peft LoRA", _peft_lora, "peft"),
    Contestant("peft-lora-fa", "peft LoRA-FA", _peft_lora_fa, "peft"),
)


class RunningLayer:
    """A layer with its input, warmed up, its number of tokens and rounds chosen."""

    def __init__(self, contestant: Contestant, case: Case, weight: Tensor, rounds: int) -> None:
        self.contestant, self.case = contestant, case
        self.model = contestant.build(case, weight)
        self.readings: list[tuple[float, float]] = []
        self._take_tokens(min(FEW_TOKENS, case.tokens))
        self.read_clock()
        if self.read_clock() * case.tokens / self.tokens < SECONDS_PER_LAYER:
            self._take_tokens(case.tokens)
            self.read_clock()
        seconds = self.read_clock()
        self.rounds = min(rounds, max(LEAST_ROUNDS, int(SECONDS_PER_LAYER / seconds)))
        self.readings.clear()

    def _take_tokens(self, tokens: int) -> None:
        self.tokens = tokens
        self.x = self.case.numbers(tokens, self.case.inputs).requires_grad_()
        self.dy = self.case.numbers(tokens, self.case.outputs)

    def _forward(self) -> None:
        self.y = self.model(self.x)

    def _backward(self) -> None:
        self.y.backward(self.dy)

    def read_clock(self) -> float:
        """Run the layer once forward and once backward, note both times, and return the seconds of both."""
        forward, backward = seconds_of_parts((self._forward, self._backward), self.case.device)
        self.x.grad = None
        self.model.zero_grad()
        self.readings.append((forward, backward))
        return forward + backward

    def saved_bytes(self) -> int:
        """Return what a forward leaves for the backward, besides weights and bases."""
        with saved_for_backward([*self.model.parameters(), *self.model.buffers()]) as saved:
            self._forward()
        del self.y
        return sum(saved.values())

    def row(self) -> LayerRow:
        """Return the numbers, without ratios."""
        forward = spread([reading[0] for reading in self.readings])
        backward = spread([reading[1] for reading in self.readings])
        return LayerRow(
            **identity(self.contestant, self.case),
            tokens=self.tokens,
            rounds=len(self.readings),
            forward_ms=forward.p50 * 1e3,
            backward_ms=backward.p50 * 1e3,
            backward_p20_ms=backward.p20 * 1e3,
            backward_p80_ms=backward.p80 * 1e3,
            saved_bytes=self.saved_bytes(),
        )


def identity(contestant: Contestant, case: Case) -> dict[str, Any]:
    """Return the fields of a row that say what was measured."""
    return {
        "device": case.device,
        "dtype": case.dtype,
        "inputs": case.inputs,
        "outputs": case.outputs,
        "name": contestant.name,
        "layer": contestant.title,
        "settings": f"rank {case.rank}, lora {case.lora_rank}",
    }


def with_ratios(rows: list[LayerRow]) -> list[LayerRow]:
    """Return the rows of one case, each beside the frozen layers' backward and the trained layer's bytes."""
    by_name = {row.name: row for row in rows}

    def ratio(row: LayerRow, field: str, other: str) -> float | None:
        mine, base = getattr(row, field), by_name.get(other)
        theirs = getattr(base, field, None)
        if mine is None or base is None or not theirs:
            return None
        return float(mine / row.tokens / (theirs / base.tokens))

    return [
        replace(
            row,
            backward_ratio_to_frozen=ratio(row, "backward_ms", FROZEN),
            backward_ratio_to_torch_frozen=ratio(row, "backward_ms", TORCH_FROZEN),
            saved_ratio_to_torch_trained=ratio(row, "saved_bytes", TRAINED),
        )
        for row in rows
    ]
