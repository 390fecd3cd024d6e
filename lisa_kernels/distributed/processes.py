"""How many processes torch.distributed has."""

from __future__ import annotations

from enum import Enum

import torch.distributed as dist

from lisa_kernels.distributed.wrappers import leave_gradients_alone
from lisa_kernels.errors import InputError


def process_count() -> int:
    """Return the number of processes in the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_one_process(what: str) -> None:
    """Raise InputError where the default group has several processes, and `what` is the work of one."""
    count = process_count()
    if count > 1:
        raise InputError(
            f"this is one of {count} processes of torch.distributed, and {what} is made for one; run it without "
            "torchrun or accelerate launch."
        )


class Sharing(Enum):
    """Who sees to it that all processes do the same steps."""

    # Each backward averages the gradients.
    BY_RANKS = "ranks"
    # There is one process only, as far as anybody knew.
    ALONE = "alone"
    BY_CALLER = "caller"

    def check(self) -> None:
        """Raise InputError before a forward that is trained on where processes would part by what it begins."""
        if self is Sharing.BY_RANKS:
            leave_gradients_alone()
        elif self is Sharing.ALONE and process_count() > 1:
            raise InputError(
                f"the model was attached before its process was one of {process_count()}, and they agree on nothing: "
                "attach after init_process_group(), Accelerator() or TrainingArguments(), whichever comes first, or "
                "with ranks=None if you reduce gradients yourself."
            )
