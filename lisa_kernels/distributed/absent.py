"""A process group whose other processes are not there, for who rehearses what several would do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed as dist

from lisa_kernels.errors import NotRehearsedError

META = "meta"


@contextmanager
def absent_others(count: int) -> Iterator[None]:
    """Be one of `count` processes, and have FSDP take torch's meta device for one that computes, within the block.

    Raises NotRehearsedError in a process that has others.
    """
    if dist.is_initialized():
        raise NotRehearsedError("shards are rehearsed by a process without others; plan before you start several.")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    idle = {name: getattr(torch.cpu, name) for name in ("Event", "Stream", "current_stream", "stream")}
    torch._register_device_module(META, SimpleNamespace(**idle, current_device=lambda: None))
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        delattr(torch, META)
        del sys.modules[f"torch.{META}"]
