"""Where the processes of one start find each other, whatever earlier starts of the same launcher have left there."""

from __future__ import annotations

import time
import uuid
from typing import Any

import torch.distributed as dist

from lisa_kernels.distributed.launcher import Launch
from lisa_kernels.errors import InputError

# How long processes wait for those that come last.
PATIENCE_SECONDS = 600.0
BETWEEN_LOOKS = 0.02
BEGINS, COMES, GOES = "lisa_kernels/begins", "lisa_kernels/comes", "lisa_kernels/goes"


def find_store(launch: Launch) -> Any:
    """Return a store that the processes of this start share, and no others. Raises InputError where one stays away.

    torchrun keeps one store over its restarts, with all that was written to it (as of torch 2.13, and since 2.5): who
    reads an address there may find that of a process which is gone, and wait for it. No number in the environment
    tells starts apart on all machines. So rank 0 gives each start a name, and knows that the others have it by a word
    of theirs, which none has said before, and they by having it back.
    """
    store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.count))  # type: ignore[attr-defined]
    return dist.distributed_c10d.PrefixStore(agree_on_name(store, launch.rank, launch.count), store)


def agree_on_name(store: Any, rank: int, count: int) -> str:
    """Return a name that all of `count` processes get, and none has got before."""
    end = time.monotonic() + PATIENCE_SECONDS
    if rank:
        return _hear(store, rank, end)
    name = uuid.uuid4().hex
    store.set(BEGINS, name)
    words = {}
    for other in range(1, count):
        while (said := _read(store, f"{COMES}/{other}").split())[:1] != [name]:
            _wait(end, f"rank {other}")
        words[other] = said[1]
    # All at once: who has its word back waits for no one that may take long to come.
    for other, word in words.items():
        store.set(f"{GOES}/{name}/{other}", word)
    return name


def _hear(store: Any, rank: int, end: float) -> str:
    word = uuid.uuid4().hex
    while True:
        name = _read(store, BEGINS)
        if name:
            store.set(f"{COMES}/{rank}", f"{name} {word}")
            if _read(store, f"{GOES}/{name}/{rank}") == word:
                return name
        _wait(end, "rank 0")


def _read(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait(end: float, whom: str) -> None:
    if time.monotonic() > end:
        raise InputError(
            f"{whom} did not come within {PATIENCE_SECONDS:.0f} seconds; see what it says, and whether its machine "
            "reaches MASTER_ADDR."
        )
    time.sleep(BETWEEN_LOOKS)
