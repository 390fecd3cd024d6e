"""Several real processes of one gloo group, forked from a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = [
    "torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "accelerate", "lisa_kernels.methods",
    "transformers.models.llama.modeling_llama",
]  # fmt: skip
# Seconds until a process that waits for another gives up.
PATIENCE = 60


def on_ranks(work: Callable[..., Any], *given: Any, count: int = 2, lost: int | None = None) -> list[Any]:
    """Return what work(rank, *given) returned in each process; what one raised is raised here, with its traceback.

    lost: the rank that ends without an answer, whose result is None.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe(duplex=False) for _ in range(count)]
        connected = context.Barrier(count)
        store = Path(folder) / "store"
        processes = [
            context.Process(target=_run, args=(rank, connected, store, ends[rank][1], work, given))
            for rank in range(count)
        ]
        for process, (_, theirs) in zip(processes, ends):
            process.start()
            # So that what one does not send is seen to end.
            theirs.close()
        try:
            answers = [_answer(ends[rank][0], processes[rank]) for rank in range(count)]
        finally:
            for process in processes:
                process.join(PATIENCE)
                process.kill()
    failed = [text for rank, (text, _) in enumerate(answers) if text is not None and rank != lost]
    if failed:
        raise AssertionError("\n".join(failed))
    return [result for _, result in answers]


def _answer(end: Connection, process: Any) -> tuple[str | None, Any]:
    if not end.poll(2 * PATIENCE):
        return f"{process.name} gave no answer", None
    try:
        text, result = end.recv()
    except EOFError:
        return f"{process.name} ended without an answer", None
    return text, result


def _run(
    rank: int, connected: Barrier, store: Path, end: Connection, work: Callable[..., Any], given: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    count = connected.parties
    # As a launcher would tell it, for what asks.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=PATIENCE)
        )
        # A rank that has its connections, and whose work ends it at once, ends them while others still make theirs.
        connected.wait(PATIENCE)
        end.send((None, work(rank, *given)))
    except BaseException:
        end.send((f"rank {rank}:\n{traceback.format_exc()}", None))
    finally:
        # Without the handshake of torch's destructor, for which a rank that failed would not come.
        end.close()
        os._exit(0)
