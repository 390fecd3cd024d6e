"""Every kernel once on small tensors, beside the CPU's results: whether it compiles on a device, and is right there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lisa_kernels.ops.blockwise8 import dequantize_blockwise, quantize_blockwise
from lisa_kernels.ops.fold import fold_
from lisa_kernels.ops.grad_norm import grad_norm
from lisa_kernels.ops.project import project
from lisa_kernels.ops.random_bits import random_key
from lisa_kernels.ops.resting import KINDS, dequantize_resting_, quantize_resting
from lisa_kernels.optim import AdamW8bit

# What sums in another order and roundings of it may change, of the largest value: products of a few hundred numbers
# in float32, and one rounding to bfloat16.
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 2.0**-7}
# An approximation in the last place that falls beside a boundary moves a code by one; more moved codes are a fault.
MOVED_CODES = 0.01


class Trial(NamedTuple):
    """What came of one operation: seconds with its compilation, and in `problem` what is wrong, "" for nothing."""

    op: str
    seconds: float
    problem: str


def try_kernels(device: torch.device) -> list[Trial]:
    """Run every operation that has kernels of its own on `device` and on the CPU, and compare."""
    return [_try(op, run, device) for op, run in _RUNS.items()]


def _try(op: str, run: Callable[[torch.device], list[Tensor]], device: torch.device) -> Trial:
    begin = time.perf_counter()
    try:
        found = [tensor.cpu() for tensor in run(device)]
    except Exception as error:  # compilers and drivers raise what they like, and all of it is an answer here
        return Trial(op, time.perf_counter() - begin, _first_line(error))
    return Trial(op, time.perf_counter() - begin, difference(found, run(torch.device("cpu"))))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def difference(found: list[Tensor], wanted: list[Tensor]) -> str:
    """Return what differs more than roundings explain; "" where nothing does."""
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if one.dtype == torch.uint8:
            moved = float((one != other).double().mean())
            if moved > MOVED_CODES:
                return f"{moved:.1%} of the codes of result {number} are others than the CPU's"
        elif not bool(((one - other).abs() <= CLOSE[one.dtype] * other.abs().max()).all()):
            worst = float((one - other).abs().max() / other.abs().max())
            return f"result {number} is {worst:.1e} of its largest value away from the CPU's"
    return ""


def _values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _key(device: torch.device) -> Tensor:
    return random_key(0, 0, torch.zeros((), dtype=torch.int64, device=device))


def _quantize(device: torch.device) -> list[Tensor]:
    values = _values(1000).to(device)
    return [*quantize_blockwise(values, "m"), *quantize_blockwise(values.abs(), "v", key=_key(device))]


def _dequantize(device: torch.device) -> list[Tensor]:
    codes, absmax = quantize_blockwise(_values(1000), "m")
    return [dequantize_blockwise(codes.to(device), absmax.to(device), "m")]


def _quantize_resting(device: torch.device) -> list[Tensor]:
    return [part for kind in KINDS for part in quantize_resting(_values(1000).to(device, torch.bfloat16), kind)]


def _dequantize_resting(device: torch.device) -> list[Tensor]:
    found = []
    for kind in KINDS:
        codes, scales = (part.to(device) for part in quantize_resting(_values(1000), kind))
        found.append(dequantize_resting_(torch.empty(1000, device=device), codes, scales, kind))
    return found


def _grad_norm(device: torch.device) -> list[Tensor]:
    return [grad_norm([_values(1000).to(device), _values(30, 40, seed=1).to(device, torch.bfloat16)])]


def _fold(device: torch.device) -> list[Tensor]:
    weights = [_values(64, 80).to(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    decay = torch.tensor(0.999, device=device)
    for weight in weights:
        fold_(weight, _values(8, 64).to(device), _values(8, 80).to(device), decay=decay, key=_key(device))
    return weights


def _project(device: torch.device) -> list[Tensor]:
    basis = torch.linalg.qr(_values(80, 16))[0].t().contiguous()
    return [
        project(basis.to(device, dtype), _values(64, 80).to(device, dtype)) for dtype in CLOSE if dtype.itemsize < 8
    ]


def _steps(eight_bit: bool) -> Callable[[torch.device], list[Tensor]]:
    def run(device: torch.device) -> list[Tensor]:
        # Vectors hold their moments in float32.
        shape = (64, 80) if eight_bit else (300,)
        params = [nn.Parameter(_values(*shape, seed=seed).to(device)) for seed in range(2)]
        optimizer = AdamW8bit(params, lr=1e-2)
        for step in range(2):
            for number, param in enumerate(params):
                param.grad = _values(*shape, seed=10 * step + number + 2).to(device)
            optimizer.step()
        states = [optimizer.state[param] for param in params]
        moments = [
            tensor for state in states for tensor in state.values() if isinstance(tensor, Tensor) and tensor.dim()
        ]
        return [*(param.detach() for param in params), *moments]

    return run


_RUNS: dict[str, Callable[[torch.device], list[Tensor]]] = {
    "quantize_blockwise": _quantize,
    "dequantize_blockwise": _dequantize,
    "adamw8_": _steps(eight_bit=True),
    "adamw32_": _steps(eight_bit=False),
    "grad_norm": _grad_norm,
    "fold_": _fold,
    "quantize_resting": _quantize_resting,
    "dequantize_resting_": _dequantize_resting,
    "project": _project,
}
