"""Opcodes on small matrices that a warp holds together: ldmatrix, stmatrix and mma.sync."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .counters import WARP
from .faults import InactiveLaneError
from .lanes import Lanes, Mask
from .number_formats import bfloat16_to_float32
from .operands import Operands, Step, Values, opcode
from .transfers import Access

ROW_BYTES, ROWS = 16, 8
LANES = np.arange(WARP)
# The row and the column pair of an 8×8 matrix of 16-bit elements, or of a result, that a lane holds.
GROUP, PLACE = LANES >> 2, LANES & 3


def _require_whole_warps(operands: Operands, lanes: Lanes, active: Mask) -> NDArray[np.int64]:
    """Return the warps that take part, with all of their lanes."""
    if active is None:
        return np.arange(lanes.count // WARP)
    here = active.reshape(-1, WARP)
    if (here.any(1) != here.all(1)).any():
        raise lanes.fault(InactiveLaneError, operands.instruction, int(np.argmax(active)), "a warp takes part in parts")
    return np.flatnonzero(here.any(1))


@opcode("ldmatrix", "stmatrix", modifiers="sync aligned m8n8 x1 x2 x4 trans shared shared_cta")
def _matrix_transfer(operands: Operands) -> Step:
    """Matrix k's rows lie at the addresses of lanes 8k … 8k + 7."""
    store = operands.instruction.opcode == "stmatrix"
    count = int(operands.one_of("x1 x2 x4")[1])
    names = operands.names(int(store))
    access = Access(operands.instruction, "shared", ROW_BYTES, write=store)
    address, transposed = operands.address(int(not store)), "trans" in operands.modifiers
    fragments = [operands.read_name(name, "b32") for name in names] if store else []
    writes = [] if store else [operands.write_name(name, "b32") for name in names]

    def step(lanes: Lanes, active: Mask) -> None:
        warps = _require_whole_warps(operands, lanes, active)
        rows = np.zeros(lanes.count, bool).reshape(-1, WARP)
        rows[warps, : ROWS * count] = True
        holders, place = access.locate(lanes, address(lanes), rows.reshape(-1))
        index = place[:, None] + np.arange(ROW_BYTES)
        if store:
            values = [np.broadcast_to(read(lanes), (lanes.count,)).reshape(-1, WARP)[warps] for read in fragments]
            given = np.stack(values, 1).view(np.uint16).reshape(-1, ROWS, ROWS)
            given = np.ascontiguousarray(given.swapaxes(1, 2)) if transposed else given
            access.store_shared(lanes, place, holders, given.reshape(-1, ROWS).view(np.uint8))
            return
        matrices = lanes.shared.words(1)[index].view(np.uint16).reshape(-1, count, ROWS, ROWS)
        matrices = np.ascontiguousarray(matrices.swapaxes(2, 3)) if transposed else matrices
        held = matrices.reshape(-1, count, 2 * WARP).view(np.uint32)
        for k, write in enumerate(writes):
            loaded = np.zeros((lanes.count // WARP, WARP), np.uint32)
            loaded[warps] = held[:, k]
            write(lanes, loaded.reshape(-1), active)

    return step


@opcode("mma", modifiers="sync aligned row col m16n8k4 m16n8k8 m16n8k16")
def _multiply_matrices(operands: Operands) -> Step:
    """D = A·B + C for A [16, k], B [k, 8]; every product exact, summed in float64 and rounded once.

    The hardware adds in an order and width that is not documented, so results agree to float32 rounding only.
    """
    shape = re.match(r"m16n8k(\d+)$", next(name for name in operands.modifiers if name.startswith("m16")))
    kinds = operands.types
    if shape is None or kinds[0] != "f32" or kinds[-1] != "f32" or kinds[1] not in ("f16", "bf16", "tf32"):
        raise operands.unknown("form")
    depth, kind = int(shape.group(1)), kinds[1]
    left, right, addend = ([operands.read_name(name, "b32") for name in operands.names(index)] for index in (1, 2, 3))
    writes = [operands.write_name(name, "f32") for name in operands.names(0)]

    def step(lanes: Lanes, active: Mask) -> None:
        _require_whole_warps(operands, lanes, active)
        warps = lanes.count // WARP
        a, b = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8))
        c = np.zeros((warps, 16, 8))
        for k, read in enumerate(left):
            for column, values in _elements(lanes, read, kind):
                a[:, GROUP + 8 * (k & 1), column + _step(kind) * (k >> 1)] = values
        for k, read in enumerate(right):
            for row, values in _elements(lanes, read, kind):
                b[:, row + _step(kind) * k, GROUP] = values
        for k, read in enumerate(addend):
            c[:, GROUP + 8 * (k >> 1), 2 * PLACE + (k & 1)] = _words(lanes, read).view(np.float32)
        result = (c + a @ b).astype(np.float32)
        for k, write in enumerate(writes):
            held = result[:, GROUP + 8 * (k >> 1), 2 * PLACE + (k & 1)]
            write(lanes, np.ascontiguousarray(held).reshape(-1), active)

    return step


def _step(kind: str) -> int:
    """Return how far apart, along k, two registers of a lane lie."""
    return 4 if kind == "tf32" else 8


def _words(lanes: Lanes, read: Any) -> Values:
    return np.ascontiguousarray(np.broadcast_to(read(lanes), (lanes.count,))).reshape(-1, WARP)


def _elements(lanes: Lanes, read: Any, kind: str) -> list[tuple[NDArray[np.int64], Values]]:
    """Return the places along k and the values [warps, 32] of the elements in one register."""
    words = _words(lanes, read)
    if kind == "tf32":
        # The hardware ignores the low 13 bits.
        return [(PLACE, (words & np.uint32(0xFFFFE000)).view(np.float32))]
    halves = [words.astype(np.uint16), (words >> np.uint32(16)).astype(np.uint16)]
    widened = [bfloat16_to_float32(half) if kind == "bf16" else half.view(np.float16) for half in halves]
    return [(2 * PLACE + half, values) for half, values in enumerate(widened)]
