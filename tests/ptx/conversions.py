"""Opcodes that convert between number formats."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import FLOATS, float_read, float_write
from .lanes import Lanes, Mask
from .number_formats import float32_to_bfloat16, float32_to_tf32
from .operands import DTYPES, Operands, Reader, Step, Values, opcode
from .parser import TYPE_BYTES

ROUND_TO_INTEGER: dict[str, Any] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode("cvta", modifiers="global to")
def _convert_address(operands: Operands) -> Step:
    """Global and generic addresses are the same here."""
    source, write = operands.read(1, "b64"), operands.write(0, "b64")
    return lambda lanes, active: write(lanes, source(lanes), active)


@opcode("cvt", modifiers="rn rz rna rni rzi rmi rpi ftz sat")
def _convert(operands: Operands) -> Step:
    target, source = operands.types[0], operands.types[-1]
    if target in ("f16x2", "bf16x2"):
        return _convert_pair(operands, target)
    if target == "tf32":
        bits, write_bits = operands.read(1, "b32"), operands.write(0, "b32")
        if "rna" not in operands.modifiers:
            raise operands.unknown("rounding")
        return lambda lanes, active: write_bits(lanes, float32_to_tf32(bits(lanes)), active)
    read = float_read(operands, 1, source)
    if source in FLOATS and target in FLOATS:
        return _float_to_float(operands, read, target)
    write = operands.write(0, target)
    if source in FLOATS:
        rounding = ROUND_TO_INTEGER[operands.one_of(" ".join(ROUND_TO_INTEGER))]
        return lambda lanes, active: write(lanes, _to_integer(read(lanes), rounding, source, target), active)
    if target in FLOATS:
        return _integer_to_float(operands, read, source, target)
    if "sat" in operands.modifiers:
        return lambda lanes, active: write(lanes, _saturated(read(lanes), target), active)
    return lambda lanes, active: write(lanes, read(lanes).astype(DTYPES[target]), active)


def _convert_pair(operands: Operands, target: str) -> Step:
    if operands.type != "f32" or "rn" not in operands.modifiers:
        raise operands.unknown("form")
    high, low, write = operands.read(1, "f32"), operands.read(2, "f32"), operands.write(0, "b32")

    def narrow(values: Values) -> Values:
        return float32_to_bfloat16(values) if target == "bf16x2" else values.astype(np.float16).view(np.uint16)

    def step(lanes: Lanes, active: Mask) -> None:
        write(lanes, (narrow(high(lanes)).astype(np.uint32) << np.uint32(16)) | narrow(low(lanes)), active)

    return step


def _float_to_float(operands: Operands, read: Reader, target: str) -> Step:
    write = float_write(operands, 0, target)
    rounding = ROUND_TO_INTEGER.get(operands.one_of(" ".join(ROUND_TO_INTEGER), ""))
    dtype = np.float32 if target == "bf16" else DTYPES[target]
    if "rz" in operands.modifiers:
        return _toward_zero(operands, read, target)
    if target == "bf16" and operands.type == "f64":
        raise operands.unknown("form")

    def step(lanes: Lanes, active: Mask) -> None:
        values = read(lanes)
        write(lanes, (rounding(values) if rounding else values).astype(dtype, copy=False), active)

    return step


def _toward_zero(operands: Operands, read: Reader, target: str) -> Step:
    if target != "bf16" or operands.type != "f32":
        raise operands.unknown("rounding")
    write = operands.write(0, "b16")
    return lambda lanes, active: write(lanes, (read(lanes).view(np.uint32) >> np.uint32(16)).astype(np.uint16), active)


def _to_integer(values: Values, rounding: Any, source: str, target: str) -> Values:
    """Round, clamp to the range, and give NaN what the PTX ISA says: 0, or the top bit where 64 bits are involved."""
    dtype = DTYPES[target]
    limits = np.iinfo(dtype)
    whole = rounding(values.astype(np.float64))
    above, below, nan = whole >= float(limits.max), whole <= float(limits.min), np.isnan(whole)
    result = np.where(above | below | nan, 0, whole).astype(dtype)
    result = np.where(above, dtype.type(limits.max), np.where(below, dtype.type(limits.min), result))
    wide = source == "f64" or TYPE_BYTES[target] == 8
    invalid = np.array([1 << (8 * dtype.itemsize - 1)], f"u{dtype.itemsize}").view(dtype)
    return np.where(nan, invalid if wide else dtype.type(0), result)


def _integer_to_float(operands: Operands, read: Reader, source: str, target: str) -> Step:
    """Round once: float32 and wider from the integer itself, narrower ones only where float32 holds it exactly."""
    if (TYPE_BYTES[target] == 2 and TYPE_BYTES[source] > 2) or "rz" in operands.modifiers:
        raise operands.unknown("form")
    write, dtype = operands.write(0, target), np.float32 if target == "bf16" else DTYPES[target]
    return lambda lanes, active: write(lanes, read(lanes).astype(dtype), active)


def _saturated(values: Values, target: str) -> Values:
    limits = np.iinfo(DTYPES[target])
    low, high = max(limits.min, np.iinfo(values.dtype).min), min(limits.max, np.iinfo(values.dtype).max)
    return np.clip(values, values.dtype.type(low), values.dtype.type(high)).astype(DTYPES[target])
