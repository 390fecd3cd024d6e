"""Opcodes that calculate: integers and floats, exact and approximate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .lanes import Lanes, Mask
from .number_formats import (
    APPROXIMATE_ERROR,
    bfloat16_to_float32,
    float32_to_bfloat16,
    flush_subnormals,
    fused_multiply_add,
    fused_multiply_add_bfloat16,
    multiply_high,
    perturbed,
)
from .operands import DTYPES, Operands, Reader, Step, Values, Writer, opcode
from .parser import TYPE_BYTES

FLOATS = {"f16", "bf16", "f32", "f64"}
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
Function = Callable[..., Values]


def maximum(*values: Values, nan: bool = False) -> Values:
    """Return the largest value; NaN counts only if `nan`; +0 is above −0."""
    return _extreme(values, np.maximum if nan else np.fmax, np.bitwise_and)


def minimum(*values: Values, nan: bool = False) -> Values:
    """Return the smallest value; NaN counts only if `nan`; −0 is below +0."""
    return _extreme(values, np.minimum if nan else np.fmin, np.bitwise_or)


def _extreme(values: tuple[Values, ...], choose: Any, join_zeros: Any) -> Values:
    result = values[0]
    for other in values[1:]:
        chosen = choose(result, other)
        if chosen.dtype.kind == "f":
            zeros = (result == 0) & (other == 0)
            if zeros.any():
                unsigned = f"u{chosen.dtype.itemsize}"
                joined = join_zeros(result.view(unsigned), other.view(unsigned)).view(chosen.dtype)
                chosen = np.where(zeros, joined, chosen)
        result = chosen
    return result


def divide(a: Values, b: Values) -> Values:
    """Return the quotient: rounded for floats, truncated toward zero for integers (by 0: all bits set)."""
    if a.dtype.kind == "f":
        return a / b
    divisor = np.where(b == 0, b.dtype.type(1), b)
    quotient = (a - np.fmod(a, divisor)) // divisor
    return np.where(b == 0, ~a.dtype.type(0), quotient)


def remainder(a: Values, b: Values) -> Values:
    """Return the integer remainder, with the sign of `a` (by 0: `a`)."""
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


EXACT: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": minimum,
    "max": maximum,
    "div": divide,
    "rem": remainder,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rcp": lambda x: np.float32(1) / x if x.dtype == np.float32 else 1 / x,
}
# The float64 functions behind approximate float32 instructions.
PRECISE: dict[str, Function] = {
    "div": np.divide,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


def float_write(operands: Operands, index: int, kind: str) -> Writer:
    """Return the writer of a float result, after `.ftz` and `.sat`."""
    write = operands.write(index, kind)
    flush = "ftz" in operands.modifiers and kind == "f32"
    saturate = "sat" in operands.modifiers
    if not (flush or saturate):
        return write

    def finish(lanes: Lanes, values: Values, active: Mask) -> None:
        if flush:
            values = flush_subnormals(values)
        if saturate:
            values = np.clip(np.nan_to_num(values, nan=0), 0, 1).astype(values.dtype)
        write(lanes, values, active)

    return finish


def float_read(operands: Operands, index: int, kind: str) -> Reader:
    """Return the reader of a float operand, after `.ftz`."""
    read = operands.read(index, kind)
    if "ftz" in operands.modifiers and kind == "f32":
        return lambda lanes: flush_subnormals(read(lanes))
    return read


def elementwise(operands: Operands, function: Function) -> Step:
    """Return the step that writes `function` of all sources, each half by itself for packed types."""
    kind = operands.type
    if kind in PACKED:
        return _packed(operands, function, PACKED[kind])
    write = float_write(operands, 0, kind)
    sources = [float_read(operands, index, kind) for index in range(1, len(operands))]
    return lambda lanes, active: write(lanes, function(*(source(lanes) for source in sources)), active)


def _packed(operands: Operands, function: Function, half: str) -> Step:
    word, bits = f"b{8 * TYPE_BYTES[operands.type]}", DTYPES[f"b{8 * TYPE_BYTES[half]}"]
    shift = DTYPES[word].type(8 * TYPE_BYTES[half])
    write = operands.write(0, word)
    sources = [operands.read(index, word) for index in range(1, len(operands))]
    flush = flush_subnormals if "ftz" in operands.modifiers and half == "f32" else None

    def widen(part: Values) -> Values:
        values = bfloat16_to_float32(part) if half == "bf16" else part.view(DTYPES[half])
        return flush(values) if flush else values

    def narrow(values: Values) -> Values:
        if half == "bf16":
            return float32_to_bfloat16(values)
        return (flush(values) if flush else values).astype(DTYPES[half], copy=False).view(bits)

    def step(lanes: Lanes, active: Mask) -> None:
        words = [source(lanes) for source in sources]
        low = narrow(function(*(widen(values.astype(bits)) for values in words)))
        high = narrow(function(*(widen((values >> shift).astype(bits)) for values in words)))
        write(lanes, (high.astype(DTYPES[word]) << shift) | low, active)

    return step


@opcode("add", "sub", "rem", "neg", "abs", modifiers="rn ftz sat")
def _arithmetic(operands: Operands) -> Step:
    if "sat" in operands.modifiers and operands.type not in FLOATS:
        raise operands.unknown("saturating form")
    return elementwise(operands, EXACT[operands.instruction.opcode])


@opcode("min", "max", modifiers="ftz NaN")
def _choose(operands: Operands) -> Step:
    return elementwise(operands, partial(EXACT[operands.instruction.opcode], nan="NaN" in operands.modifiers))


@opcode("mul", modifiers="rn ftz sat lo hi wide")
def _multiply(operands: Operands) -> Step:
    if operands.type in FLOATS or operands.type in PACKED:
        return elementwise(operands, np.multiply)
    write = operands.write(0, _product_type(operands))
    product = _integer_product(operands)
    return lambda lanes, active: write(lanes, product(lanes), active)


@opcode("mad", "fma", modifiers="rn ftz sat lo hi wide")
def _multiply_add(operands: Operands) -> Step:
    kind = operands.type
    if kind in ("bf16", "bf16x2"):
        return elementwise(operands, fused_multiply_add_bfloat16)
    if kind in FLOATS or kind in PACKED:
        return elementwise(operands, fused_multiply_add)
    kind = _product_type(operands)
    write, product, addend = operands.write(0, kind), _integer_product(operands), operands.read(3, kind)
    return lambda lanes, active: write(lanes, product(lanes) + addend(lanes), active)


def _product_type(operands: Operands) -> str:
    kind = operands.type
    return f"{kind[0]}{2 * int(kind[1:])}" if "wide" in operands.modifiers else kind


def _integer_product(operands: Operands) -> Reader:
    """Return the low, high or whole product of the first two sources."""
    kind = operands.type
    first, second = operands.read(1, kind), operands.read(2, kind)
    part = operands.one_of("lo hi wide")
    if part == "lo":
        return lambda lanes: first(lanes) * second(lanes)
    if part == "hi" and kind == "u64":
        return lambda lanes: multiply_high(first(lanes), second(lanes))
    bits = int(kind[1:])
    wide = DTYPES[f"{kind[0]}{2 * bits}"]
    if part == "wide":
        return lambda lanes: first(lanes).astype(wide) * second(lanes).astype(wide)
    return lambda lanes: ((first(lanes).astype(wide) * second(lanes).astype(wide)) >> wide.type(bits)).astype(
        DTYPES[kind]
    )


@opcode("div", "sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh", modifiers="rn approx full ftz")
def _quotients_and_functions(operands: Operands) -> Step:
    name, how = operands.instruction.opcode, operands.one_of("approx full rn", "rn")
    if how == "rn":
        return elementwise(operands, EXACT[name])
    if operands.type != "f32":
        raise operands.unknown("approximate form")
    bound, function = APPROXIMATE_ERROR[f"{name}.{how}"], PRECISE[name]
    write = float_write(operands, 0, "f32")
    sources = [float_read(operands, index, "f32") for index in range(1, len(operands))]

    def step(lanes: Lanes, active: Mask) -> None:
        exact = function(*(source(lanes).astype(np.float64) for source in sources))
        noise = lanes.launch.noise
        write(lanes, exact.astype(np.float32) if noise is None else perturbed(exact, bound, noise), active)

    return step


@opcode("copysign")
def _copysign(operands: Operands) -> Step:
    kind = operands.type
    sign, size, write = operands.read(1, kind), operands.read(2, kind), operands.write(0, kind)
    return lambda lanes, active: write(lanes, np.copysign(size(lanes), sign(lanes)), active)
