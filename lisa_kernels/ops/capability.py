"""What a device computes in hardware: which dtype its weights should have, and whether kernels run on it at all."""

from __future__ import annotations

from functools import cache

import torch

from lisa_kernels.errors import InputError

# Of NVIDIA's cards: from where on Triton compiles for them, and from where on they multiply bfloat16.
FIRST_SUPPORTED, FIRST_WITH_BFLOAT16 = (7, 0), (8, 0)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of an NVIDIA device; of others, which have none, the one that suffices for all."""
    return torch.cuda.get_device_capability(device) if torch.version.hip is None else FIRST_WITH_BFLOAT16


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device multiplies bfloat16 itself; one that is not there, as in a plan, counts as one that does.

    `torch.cuda.is_bf16_supported()` counts emulation, in which torch's products with float32 results refuse to run.
    """
    return not torch.cuda.is_available() or capability(device) >= FIRST_WITH_BFLOAT16


def auto_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of weights that train on a device: float32 on CPUs, bfloat16 or, on older GPUs, float16."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float16


def check_capability(device: torch.device) -> None:
    """Raise InputError for a CUDA device that is too old for the kernels."""
    if device.type == "cuda" and capability(device) < FIRST_SUPPORTED:
        raise InputError(
            f"{torch.cuda.get_device_name(device)} has compute capability {_dotted(capability(device))}; kernels need "
            f"{_dotted(FIRST_SUPPORTED)}: use another card (--device cuda:N), or the CPU (--device cpu)."
        )


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise InputError for bfloat16 on a CUDA device that only emulates it, and for devices too old for any dtype."""
    check_capability(device)
    if dtype == torch.bfloat16 and device.type == "cuda" and not multiplies_bfloat16(device):
        raise InputError(
            f"bf16 was asked for, but {torch.cuda.get_device_name(device)} has compute capability "
            f"{_dotted(capability(device))}, and bfloat16 needs {_dotted(FIRST_WITH_BFLOAT16)}: use fp16, or fp32."
        )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
