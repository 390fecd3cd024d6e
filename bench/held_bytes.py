"""Bytes: what an optimizer keeps between steps, and what it takes for the time of one."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.optim import Optimizer

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the plain tensors inside a state's value: torchao wraps them in tensors, FlashOptim in objects."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of all tensors in `optimizer.state`; storage that several share counts once."""
    return held_bytes(optimizer.state.values())


def held_bytes(values: Iterable[Any]) -> int:
    """Return the bytes of all tensors in `values`, which may be nested; storage that several share counts once."""
    storages = {}
    for value in values:
        for tensor in _tensors(value):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextlib.contextmanager
def saved_for_backward(kept: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Collect the storages, with their bytes, that autograd keeps for the backward, besides those of `kept`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in kept}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


def free_bytes(device: str) -> int:
    """Return the memory that is free on the device."""
    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else int(psutil.virtual_memory().available)


def extra_bytes(step: Callable[[], object], device: str) -> int:
    """Return the most memory that `step` holds at one time beyond what it found; it runs up to two times.

    On a GPU, the rise of `max_memory_allocated`. On a CPU, the larger of two readings: torch's own allocations as its
    profiler saw them, exact to the byte, and the rise of the process's peak resident size, which sees the buffers of
    compiled code too, but not memory that the C library had kept from earlier.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before
    return max(_resident_rise(step), _allocated_rise(step))


def status_bytes(field: str) -> int:
    """Return a size that Linux keeps for this process: VmRSS, what is resident now, or VmHWM, the most that was."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak() -> bool:
    """Make the process's peak what is resident now; False, and no change, where the system does not let it."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:  # not Linux, or a container
        return False
    return True


def _resident_rise(step: Callable[[], object]) -> int:
    if not reset_peak():
        return 0
    before = status_bytes("VmRSS")
    step()
    return max(0, status_bytes("VmHWM") - before)


def _allocated_rise(step: Callable[[], object]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with silent_stderr(), torch.profiler.profile(profile_memory=True) as profile:
            step()
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        ((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"), key=lambda pair: pair[0]
    )
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Keep what C++ code writes to standard error to itself: torch 2.13's profiler announces its start and end."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
