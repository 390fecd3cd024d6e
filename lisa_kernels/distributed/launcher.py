"""What launchers of several processes tell each of them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lisa_kernels.errors import InputError

# How many processes there are, by the names under which launchers tell it, and who these are.
TOLD_BY = {
    "WORLD_SIZE": "torchrun or accelerate launch",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
}


def check_one_launched(what: str, told: Mapping[str, str] | None = None) -> None:
    """Raise InputError where a launcher has started `what` several times.

    told: the environment of this process, where another is not given.
    """
    told = os.environ if told is None else told
    for name, launcher in TOLD_BY.items():
        count = told.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise InputError(
                f"{what} was started {count} times by {launcher} ({name}={count}), and each would do all of it, into "
                "the same files; start it once, without a launcher."
            )
