"""Which kernel runs each operation on this machine, and why not the others: what `lisa-kernels info` prints."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lisa_kernels import native
from lisa_kernels.ops.library import triton_present

# Operations with kernels of their own, in C++ for CPUs and in Triton for GPUs …
KERNEL_OPS = (
    "quantize_blockwise",
    "dequantize_blockwise",
    "adamw8_",
    "adamw32_",
    "grad_norm",
    "fold_",
    "quantize_resting",
    "dequantize_resting_",
)
# … with kernels of their own on CPUs only, numbers and not tensors being their work …
CPU_OPS = ("step_inputs",)
# … that are torch's matrix products on CPUs and Triton's on GPUs …
PRODUCT_OPS = ("project",)
# … and that are torch's everywhere.
TORCH_OPS = (
    "linear",
    "lowrank_linear",
    "resting_linear",
    "lowrank_embedding",
    "linear_cross_entropy",
    "segment_attention",
)


class KernelChoice(NamedTuple):
    """The kernel of one operation on one device; `why_not_others` is empty where there is no other."""

    op: str
    device: str
    kernel: str
    why_not_others: str


def _on_cpu() -> tuple[str, str]:
    library = native.load()
    if library is None:
        return "PyTorch", f"C++: {native.why_absent()}"
    return f"C++ ({native.INSTRUCTION_SETS[library.instruction_set]})", "Triton: runs on GPUs only"


def _on_gpu() -> tuple[str, str]:
    if not triton_present():
        return "PyTorch", "Triton: not installed (pip install triton)"
    return "Triton", "C++: runs on CPU tensors only"


def kernels_in_use() -> list[KernelChoice]:
    """Return one row per operation and kind of device that is present here."""
    devices = {"cpu": _on_cpu()}
    if torch.cuda.is_available():
        devices["cuda"] = _on_gpu()
    rows = []
    for device, choice in devices.items():
        rows += [KernelChoice(op, device, *choice) for op in KERNEL_OPS]
        numbers = choice if device == "cpu" else ("PyTorch", "C++: runs on CPU tensors only")
        rows += [KernelChoice(op, device, *numbers) for op in CPU_OPS]
        products = choice if device == "cuda" else ("PyTorch", "Triton: runs on GPUs only")
        rows += [KernelChoice(op, device, *products) for op in PRODUCT_OPS]
        rows += [KernelChoice(op, device, "PyTorch", "") for op in TORCH_OPS]
    return rows
