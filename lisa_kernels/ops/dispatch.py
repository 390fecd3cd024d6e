"""Which kernel runs each operation on this machine, and why not the others: what `lisa-kernels info` prints."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lisa_kernels import native

CPU_OPS = ("quantize_blockwise", "dequantize_blockwise", "adamw8_", "adamw32_", "fold_")
TORCH_OPS = ("lowrank_linear", "lowrank_linear_backward")


class KernelChoice(NamedTuple):
    """The kernel of one operation on one device; `why_not_others` is empty where there is no other."""

    op: str
    device: str
    kernel: str
    why_not_others: str


def _cpu_choice(op: str, library: native.Library | None) -> KernelChoice:
    if library is None:
        return KernelChoice(op, "cpu", "PyTorch", f"C++: {native.why_absent()}")
    return KernelChoice(op, "cpu", f"C++ ({native.INSTRUCTION_SETS[library.instruction_set]})", "")


def kernels_in_use() -> list[KernelChoice]:
    """Return one row per operation and kind of device that is present here."""
    library = native.load()
    rows = [_cpu_choice(op, library) for op in CPU_OPS]
    rows += [KernelChoice(op, "cpu", "PyTorch", "") for op in TORCH_OPS]
    if torch.cuda.is_available():
        rows += [KernelChoice(op, "cuda", "PyTorch", "C++: runs on CPU tensors only") for op in CPU_OPS]
        rows += [KernelChoice(op, "cuda", "PyTorch", "") for op in TORCH_OPS]
    return rows
