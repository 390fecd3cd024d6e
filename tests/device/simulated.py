"""The simulated driver as tests see it: the order in which queued work runs, what made the host wait, and faults.

The driver is `libcuda.so.1` of `driver/`, preloaded below torch. Work that it cannot do itself, the results of torch's
kernels and Triton's machine code, is queued on its streams as Python functions.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .additions import seed_draws

HERE = str(Path(__file__).parent)
ROOT = str(Path(__file__).parents[2])
_PLACES = 8

driver = ctypes.CDLL("libcuda.so.1")
for _name, _result, _arguments in (
    ("sim_listen", None, [c_void_p, c_void_p]),
    ("sim_listen_to_launches", None, [c_void_p]),
    ("sim_set_order", None, [c_int, c_int64]),
    ("sim_drain", None, []),
    ("sim_enqueue", None, [c_int, c_void_p, c_char_p, c_void_p, c_int64]),
    ("sim_is_capturing", c_int, [c_void_p]),
    ("sim_device_count", c_int, []),
    ("sim_current_device", c_int, []),
    ("sim_device_bytes", c_int64, []),
    ("sim_base", c_int64, [c_int]),
    ("sim_alias", c_int64, [c_int]),
    ("sim_is_live", c_int, [c_void_p, c_int64]),
    ("sim_pieces", c_int64, [c_int, c_void_p, c_int64]),
    ("sim_locked_bytes", c_int64, []),
    ("sim_set_lock_limit", None, [c_int64]),
    ("sim_set_poison", None, [c_int]),
    ("sim_launches", c_int64, [c_char_p]),
    ("sim_allocations", c_int64, []),
):
    _function = getattr(driver, _name)
    _function.restype, _function.argtypes = _result, _arguments


class Order(IntEnum):
    """When queued work runs: as it is queued, when something waits for it, or a random piece at each call."""

    EAGER = 0
    LATE = 1
    RANDOM = 2


class Note(NamedTuple):
    """What happened and the places in our code that led to it, innermost first."""

    what: str
    places: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.what}, at {' < '.join(self.places)}"


faults: list[Note] = []
_waits: list[Note] | None = None
_work: dict[int, Callable[[], None]] = {}
# Work under capture is part of a graph and may run often.
_kept: set[int] = set()
_numbers = itertools.count()


def set_order(order: Order, seed: int = 0) -> None:
    """Run queued work in an order from now on, after all that is queued, and add with atomics in orders of the seed."""
    driver.sim_set_order(order, seed)
    seed_draws(seed)


def drain() -> None:
    """Run all that is queued."""
    driver.sim_drain()


def launches(part: str = "") -> int:
    """Return how many kernels and products whose name has this part were launched so far; Triton's begin with it."""
    count: int = driver.sim_launches(part.encode())
    return count


def allocations() -> int:
    """Return how often the driver was asked for memory, of devices or locked, so far."""
    count: int = driver.sim_allocations()
    return count


def fault(what: str) -> None:
    """Note what a real device would not have survived, or would have answered with wrong values."""
    faults.append(Note(what, _places()))


@contextmanager
def waits() -> Iterator[list[Note]]:
    """Collect the calls that make the host wait for a device."""
    global _waits
    before, _waits = _waits, []
    try:
        yield _waits
    finally:
        _waits = before


@contextmanager
def noted_faults() -> Iterator[list[Note]]:
    """Collect the faults of what runs inside; they are expected and fail no test."""
    before, inside = len(faults), []
    try:
        yield inside
    finally:
        drain()
        inside += faults[before:]
        del faults[before:]


def enqueue(device: int, what: str, work: Callable[[], None], stream: int | None = None) -> None:
    """Queue work on a stream, by default the current one of a device."""
    stream = torch._C._cuda_getCurrentRawStream(device) if stream is None else stream
    number = next(_numbers)
    _work[number] = work
    if driver.sim_is_capturing(stream):
        _kept.add(number)
    driver.sim_enqueue(device, stream, what.encode(), _call, number)


def _places() -> tuple[str, ...]:
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(HERE + "/simulat")]
    ours = [frame for frame in frames if "/torch/" not in frame.filename and "/_pytest/" not in frame.filename]
    names = (f"{frame.filename.removeprefix(ROOT + '/')}:{frame.lineno}:{frame.name}" for frame in reversed(ours))
    return tuple(itertools.islice(names, _PLACES))


@ctypes.CFUNCTYPE(None, c_int64)
def _run(number: int) -> None:
    work = _work[number] if number in _kept else _work.pop(number)
    # A finalizer that asks the device for something would let later work begin in the middle of this one.
    collects = gc.isenabled()
    gc.disable()
    try:
        with _disable_current_modes(), torch.no_grad():
            work()
    except Exception:
        # Nothing above can catch it: the device works on its own.
        fault(f"queued work raised {traceback.format_exc()}")
        traceback.print_exc(file=sys.stderr)
    finally:
        if collects:
            gc.enable()


@ctypes.CFUNCTYPE(None, c_char_p)
def _on_wait(what: bytes) -> None:
    if _waits is not None:
        _waits.append(Note(what.decode(), _places()))


@ctypes.CFUNCTYPE(None, c_char_p)
def _on_fault(what: bytes) -> None:
    fault(what.decode())


_call = ctypes.cast(_run, c_void_p)
driver.sim_listen(ctypes.cast(_on_wait, c_void_p), ctypes.cast(_on_fault, c_void_p))
