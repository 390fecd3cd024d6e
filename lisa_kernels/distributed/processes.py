"""How many processes torch.distributed has."""

from __future__ import annotations

import torch.distributed as dist

from lisa_kernels.errors import InputError


def process_count() -> int:
    """Return the number of processes in the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_one_process() -> None:
    """Raise InputError where the default group has several processes, between which nothing has been agreed."""
    count = process_count()
    if count > 1:
        raise InputError(
            f"this is one of {count} processes of torch.distributed, and nothing is agreed between them: each would "
            "train a model of its own; run in one process, without torchrun or accelerate launch, or reduce gradients "
            "in your own loop, under a full-rank method, and give attach ranks=None."
        )
