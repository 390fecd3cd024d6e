"""What launchers of several processes tell each of them."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lisa_kernels.errors import InputError

# How many processes there are, by the names under which launchers tell it, and who these are.
TOLD_BY = {
    "WORLD_SIZE": "torchrun or accelerate launch",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
}
ADDRESSES = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher has started: its number and theirs, on all machines and on this one."""

    rank: int
    count: int
    local_rank: int
    local_count: int


def check_one_launched(what: str, told: Mapping[str, str] | None = None) -> None:
    """Raise InputError where a launcher has started `what` several times.

    told: the environment of this process, where another is not given.
    """
    told = os.environ if told is None else told
    for name, launcher in TOLD_BY.items():
        count = _count(told, name)
        if count > 1:
            raise InputError(
                f"{what} was started {count} times by {launcher} ({name}={count}), and each would do all of it, into "
                "the same files; start it once, without a launcher."
            )


def read_launch(told: Mapping[str, str] | None = None) -> Launch | None:
    """Return this process's place among several that can reach each other, None for a single one.

    Raises InputError where a launcher tells how many there are, and not where.
    """
    told = os.environ if told is None else told
    if _count(told, "WORLD_SIZE") > 1:
        missing = [name for name in ADDRESSES if name not in told]
        if missing:
            raise InputError(
                f"WORLD_SIZE says that this is one of {told['WORLD_SIZE']} processes, and {missing[0]} is not set, so "
                "that they cannot find each other; start them by torchrun, or unset WORLD_SIZE for a single one."
            )
        return Launch(
            int(told["RANK"]), int(told["WORLD_SIZE"]), int(told["LOCAL_RANK"]), int(told["LOCAL_WORLD_SIZE"])
        )
    for name, launcher in TOLD_BY.items():
        if _count(told, name) > 1:
            raise InputError(
                f"{launcher} has started {told[name]} processes ({name}={told[name]}) that do not know of each other; "
                "have it start torchrun on each machine, or start a single process."
            )
    return None


def environment_of_one(told: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of this process without its place among others, for a process that has none."""
    told = os.environ if told is None else told
    return {name: value for name, value in told.items() if name not in (*ADDRESSES, *TOLD_BY)}


def read_launcher(told: Mapping[str, str] | None = None) -> str:
    """Return a name of what started this process and would start it again, which nothing else ever has; "" of nothing.

    One process that is left of several has it too.
    """
    told = os.environ if told is None else told
    # torchrun makes this folder once for all its starts: folder/attempt_0/local rank/error.json.
    folders = Path(told.get("TORCHELASTIC_ERROR_FILE", "")).parents
    return f"{platform.node()}:{folders[2]}" if len(folders) > 2 else ""


def _count(told: Mapping[str, str], name: str) -> int:
    text = told.get(name, "")
    return int(text) if text.isdecimal() else 1
