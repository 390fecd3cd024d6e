"""Launches of Triton's kernels: compiled and launched as on a GPU, their machine code run by the emulator."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ptx import Memory, Program
from ptx.counters import WARP
from ptx.parser import TYPE_BYTES

from .additions import drawn_order
from .simulated import driver, enqueue, fault

_programs: dict[int, Program] = {}


class DeviceMemory(Memory):
    """A device's memory as the emulator takes it, under its real addresses; only blocks given out may be touched."""

    def __init__(self, device: int, blocks: NDArray[np.int64]) -> None:
        super().__init__()
        self._base = driver.sim_base(device)
        self._whole = _bytes_of(device)
        blocks = blocks[np.argsort(blocks[:, 0])]
        self._first, self._end = blocks[:, 0], blocks[:, 0] + blocks[:, 1]

    def upload(self, track_programs: bool) -> None:
        """Nothing is copied: kernels work in place."""

    def download(self) -> None:
        """Nothing is copied: kernels work in place."""

    def outside(self, addresses: NDArray[np.int64], width: int) -> int | None:
        """Return the index of an access of `width` bytes that lies in no block, or None."""
        low, high = int(addresses.min()), int(addresses.max())
        place = np.searchsorted(self._first, low, "right") - 1
        if place >= 0 and high + width <= self._end[place]:
            return None
        place = np.searchsorted(self._first, addresses, "right") - 1
        wrong = (place < 0) | (addresses + width > self._end[place])
        return int(np.argmax(wrong)) if wrong.any() else None

    def describe(self, address: int) -> str:
        """Say where an address lies."""
        return f"address {address:#x} of the device"

    def words(self, itemsize: int) -> tuple[NDArray[Any], int]:
        """Return the memory as unsigned integers, and the address of the first."""
        return self._whole[: self._whole.nbytes // itemsize * itemsize].view(f"u{itemsize}"), self._base


@cache
def _bytes_of(device: int) -> NDArray[np.uint8]:
    raw = (ctypes.c_char * driver.sim_device_bytes()).from_address(driver.sim_alias(device))
    return np.frombuffer(raw, np.uint8)


def _blocks(device: int) -> NDArray[np.int64]:
    """Return first address and bytes of what torch's allocator has given out, and of memory that is not its own."""
    segments = [segment for segment in torch.cuda.memory_snapshot() if segment["device"] == device]
    own = {segment["address"] for segment in segments}
    blocks = [block for segment in segments for block in segment["blocks"] if block["state"].startswith("active")]
    count = driver.sim_pieces(device, None, 0)
    pieces = (c_int64 * (2 * count))()
    driver.sim_pieces(device, pieces, count)
    pairs = [(block["address"], block["size"]) for block in blocks]
    pairs += [pair for pair in zip(pieces[::2], pieces[1::2]) if pair[0] not in own]
    return np.array(pairs or [(0, 0)], np.int64)


class Launched(ctypes.Structure):
    """What the driver tells of a launch."""

    _fields_ = [
        ("function", c_int64), ("grid", c_int64 * 3), ("threads", c_int64), ("shared_bytes", c_int64),
        ("stream", c_int64), ("arguments", ctypes.POINTER(c_void_p)),
    ]  # fmt: skip


@ctypes.CFUNCTYPE(None, ctypes.POINTER(Launched))
def _on_launch(pointer: Any) -> None:
    launched, device = pointer.contents, driver.sim_current_device()
    program = _programs[launched.function]
    if program.shared_bytes != launched.shared_bytes:
        fault(f"a kernel of {program.shared_bytes} bytes of shared memory is given {launched.shared_bytes}")
    values = []
    for place, (kind, _) in enumerate(program.module.parameters):
        raw = ctypes.string_at(launched.arguments[place], TYPE_BYTES[kind])
        values.append(int.from_bytes(raw, "little"))
    grid, warps, blocks = tuple(launched.grid), launched.threads // WARP, _blocks(device)

    def work() -> None:
        # A grid's programs begin in no order that a kernel may count on.
        programs = drawn_order(math.prod(grid)).numpy()
        memory = DeviceMemory(device, blocks)
        program.launch(values, grid, warps, memory=memory, programs=programs, counted=False)

    enqueue(device, f"triton {program.module.name}", work, launched.stream)


def _on_load(module: Any, function: Any, name: str, files: dict[str, str], digest: str) -> None:
    """Remember the machine code of a kernel that Triton has loaded."""
    ptx = next(Path(path) for file, path in files.items() if file.endswith(".ptx"))
    settings = json.loads(next(Path(path) for file, path in files.items() if file.endswith(".json")).read_text())
    _programs[function] = _program(ptx.read_text(), settings["shared"])


@cache
def _program(ptx: str, shared_bytes: int) -> Program:
    return Program(ptx, shared_bytes)


def listen() -> None:
    """Run every kernel that Triton launches from now on."""
    import triton

    triton.knobs.runtime.kernel_load_end_hook.add(_on_load)
    driver.sim_listen_to_launches(ctypes.cast(_on_launch, c_void_p))


@contextmanager
def unheard() -> Iterator[None]:
    """Have launches compute nothing meanwhile."""
    driver.sim_listen_to_launches(None)
    try:
        yield
    finally:
        driver.sim_listen_to_launches(ctypes.cast(_on_launch, c_void_p))
