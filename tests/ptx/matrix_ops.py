"""Opcodes on small matrices that a warp holds together: ldmatrix, stmatrix and mma.sync."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .counters import WARP
from .faults import InactiveLaneError
from .lanes import Lanes, Mask
from .number_formats import bfloat16_to_float32
from .operands import Operands, Reader, Step, Values, opcode, spread
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
            values = [spread(read(lanes), lanes).reshape(-1, WARP)[warps] for read in fragments]
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

    a_from, b_from, c_from = _places(kind, depth, len(left), len(right))
    c_to = c_from.argsort()

    def step(lanes: Lanes, active: Mask) -> None:
        _require_whole_warps(operands, lanes, active)
        a = _elements(lanes, left, kind)[:, a_from].astype(np.float64)
        b = _elements(lanes, right, kind)[:, b_from].astype(np.float64)
        c = _words(lanes, addend).view(np.float32)[:, c_from].reshape(-1, 16, 8)
        result = (c + a @ b).astype(np.float32).reshape(-1, 16 * 8)[:, c_to].reshape(-1, len(writes), WARP)
        for k, write in enumerate(writes):
            write(lanes, np.ascontiguousarray(result[:, k]).reshape(-1), active)

    return step


@cache
def _places(kind: str, depth: int, left: int, right: int) -> tuple[NDArray[np.int64], ...]:
    """Return which of a warp's elements are A [16, depth], B [depth, 8] and C [128], which is [16, 8]."""
    halves = 1 if kind == "tf32" else 2
    a, b = np.zeros((16, depth), np.int64), np.zeros((depth, 8), np.int64)
    for half in range(halves):
        along = halves * PLACE + half
        for k in range(left):
            a[GROUP + 8 * (k & 1), along + _step(kind) * (k >> 1)] = (k * WARP + LANES) * halves + half
        for k in range(right):
            b[along + _step(kind) * k, GROUP] = (k * WARP + LANES) * halves + half
    c = [(GROUP + 8 * (k >> 1)) * 8 + 2 * PLACE + (k & 1) for k in range(4)]
    return a, b, np.concatenate(c).argsort()


def _step(kind: str) -> int:
    """Return how far apart, along k, two registers of a lane lie."""
    return 4 if kind == "tf32" else 8


def _words(lanes: Lanes, registers: list[Reader]) -> Values:
    """Return the words of some registers, uint32 [warps, registers · 32]."""
    words = np.empty((lanes.count // WARP, len(registers), WARP), np.uint32)
    for k, read in enumerate(registers):
        words[:, k] = spread(read(lanes), lanes).reshape(-1, WARP)
    return words.reshape(len(words), -1)


def _elements(lanes: Lanes, registers: list[Reader], kind: str) -> Values:
    """Return the elements in some registers, [warps, elements]."""
    words = _words(lanes, registers)
    if kind == "tf32":
        # The hardware ignores the low 13 bits.
        return (words & np.uint32(0xFFFFE000)).view(np.float32)
    return bfloat16_to_float32(words.view(np.uint16)) if kind == "bf16" else words.view(np.float16)
