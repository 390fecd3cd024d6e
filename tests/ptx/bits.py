"""Opcodes that move bits: logic, shifts, fields, bytes, moves, comparisons and selections."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import FLOATS
from .lanes import Lanes, Mask
from .operands import DTYPES, Operands, Reader, Step, Values, opcode
from .parser import TYPE_BYTES

LOGIC: dict[str, Any] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


def _unsigned(operands: Operands) -> str:
    return "pred" if operands.type == "pred" else f"b{8 * TYPE_BYTES[operands.type]}"


@opcode(*LOGIC)
def _logic(operands: Operands) -> Step:
    kind, function = _unsigned(operands), LOGIC[operands.instruction.opcode]
    write = operands.write(0, kind)
    sources = [operands.read(index, kind) for index in range(1, len(operands))]
    return lambda lanes, active: write(lanes, function(*(source(lanes) for source in sources)), active)


@opcode("lop3")
def _lop3(operands: Operands) -> Step:
    write, table = operands.write(0, "b32"), int(operands.instruction.operands[4], 0)
    sources = [operands.read(index, "b32") for index in (1, 2, 3)]

    def step(lanes: Lanes, active: Mask) -> None:
        a, b, c = (source(lanes) for source in sources)
        result = np.zeros(1, np.uint32)
        for row in range(8):
            if table >> row & 1:
                result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        write(lanes, result, active)

    return step


@opcode("shl", "shr")
def _shift(operands: Operands) -> Step:
    """Amounts of the width and more give 0, or the sign."""
    kind = operands.type
    source, amount, write = operands.read(1, kind), operands.read(2, "u32"), operands.write(0, kind)
    left, signed, bits = operands.instruction.opcode == "shl", kind[0] == "s", 8 * TYPE_BYTES[kind]
    shift = np.left_shift if left else np.right_shift

    def step(lanes: Lanes, active: Mask) -> None:
        values, by = source(lanes), amount(lanes)
        shifted = shift(values, np.minimum(by, np.uint32(bits - 1)).astype(values.dtype))
        if left or not signed:
            shifted = np.where(by >= bits, values.dtype.type(0), shifted)
        write(lanes, shifted, active)

    return step


@opcode("shf", modifiers="l r wrap clamp")
def _funnel_shift(operands: Operands) -> Step:
    write = operands.write(0, "b32")
    low, high, amount = (operands.read(index, "b32") for index in (1, 2, 3))
    wrap, right = "wrap" in operands.modifiers, "r" in operands.modifiers

    def step(lanes: Lanes, active: Mask) -> None:
        by = amount(lanes).astype(np.uint64)
        by = by & np.uint64(31) if wrap else np.minimum(by, np.uint64(32))
        word = (high(lanes).astype(np.uint64) << np.uint64(32)) | low(lanes)
        write(lanes, ((word >> by) if right else ((word << by) >> np.uint64(32))).astype(np.uint32), active)

    return step


@opcode("bfe")
def _extract_field(operands: Operands) -> Step:
    kind = operands.type
    bits, signed = 8 * TYPE_BYTES[kind], kind[0] == "s"
    source, write = operands.read(1, f"b{bits}"), operands.write(0, f"b{bits}")
    position, length = operands.read(2, "u32"), operands.read(3, "u32")

    def step(lanes: Lanes, active: Mask) -> None:
        values = source(lanes).astype(np.uint64)
        first, count = position(lanes).astype(np.uint64) & np.uint64(255), length(lanes).astype(np.uint64)
        count = count & np.uint64(255)
        field = _shift_right(values, first) & _low_ones(count)
        if signed:
            top = np.minimum(first + count - np.minimum(count, np.uint64(1)), np.uint64(bits - 1))
            negative = (_shift_right(values, top) & np.uint64(1)).astype(bool) & (count > 0)
            # Beyond the value's own top bit, the field goes on with the sign.
            inside = np.minimum(count, np.uint64(bits) - np.minimum(first, np.uint64(bits)))
            field = np.where(negative, field | ~_low_ones(inside), field)
        write(lanes, field.astype(f"u{bits // 8}"), active)

    return step


@opcode("bfi")
def _insert_field(operands: Operands) -> Step:
    kind = operands.type
    field, base, write = operands.read(1, kind), operands.read(2, kind), operands.write(0, kind)
    position, length = operands.read(3, "u32"), operands.read(4, "u32")

    def step(lanes: Lanes, active: Mask) -> None:
        first, count = position(lanes).astype(np.uint64) & np.uint64(255), length(lanes).astype(np.uint64)
        mask = _shift_left(_low_ones(count & np.uint64(255)), first)
        inserted = _shift_left(field(lanes).astype(np.uint64), first) & mask
        write(lanes, ((base(lanes).astype(np.uint64) & ~mask) | inserted).astype(DTYPES[kind]), active)

    return step


def _shift_right(values: Values, by: Values) -> Values:
    return np.where(by < 64, values >> np.minimum(by, np.uint64(63)), np.uint64(0))


def _shift_left(values: Values, by: Values) -> Values:
    return np.where(by < 64, values << np.minimum(by, np.uint64(63)), np.uint64(0))


def _low_ones(count: Values) -> Values:
    return _shift_left(np.ones(1, np.uint64), count) - np.uint64(1)


@opcode("prmt")
def _permute_bytes(operands: Operands) -> Step:
    write = operands.write(0, "b32")
    low, high, selector = (operands.read(index, "b32") for index in (1, 2, 3))
    text = operands.instruction.operands[3]
    if text[0].isdigit() and not int(text.rstrip("U"), 0) & 0x8888:
        return _permute_fixed(operands, int(text.rstrip("U"), 0))

    def step(lanes: Lanes, active: Mask) -> None:
        word = (high(lanes).astype(np.uint64) << np.uint64(32)) | low(lanes)
        chosen, result = selector(lanes), np.zeros(1, np.uint32)
        for place in range(4):
            pick = chosen >> np.uint32(4 * place)
            byte = ((word >> (np.uint64(8) * (pick & np.uint32(7)))) & np.uint64(255)).astype(np.uint32)
            # The fourth bit of a selector asks for the byte's sign instead of the byte.
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result = result | np.where(pick & np.uint32(8), sign, byte) << np.uint32(8 * place)
        write(lanes, result, active)

    return step


def _permute_fixed(operands: Operands, selector: int) -> Step:
    """Return the permutation by a selector that is known and copies bytes only."""
    write, halves = operands.write(0, "b32"), (operands.read(1, "b32"), operands.read(2, "b32"))
    picks = [selector >> 4 * place & 7 for place in range(4)]

    def step(lanes: Lanes, active: Mask) -> None:
        words = [half(lanes) for half in halves]
        result = np.zeros(1, np.uint32)
        for place, pick in enumerate(picks):
            byte = words[pick >> 2] >> np.uint32(8 * (pick & 3)) & np.uint32(255)
            result = result | byte << np.uint32(8 * place)
        write(lanes, result, active)

    return step


@opcode("popc", "clz", "brev")
def _count_and_reverse(operands: Operands) -> Step:
    kind, name = f"b{8 * TYPE_BYTES[operands.type]}", operands.instruction.opcode
    source, write = operands.read(1, kind), operands.write(0, kind if name == "brev" else "b32")

    def step(lanes: Lanes, active: Mask) -> None:
        values = source(lanes)
        digits = np.unpackbits(np.ascontiguousarray(values[:, None].byteswap()).view(np.uint8), axis=1)
        if name == "brev":
            flipped = np.ascontiguousarray(np.packbits(digits[:, ::-1], axis=1))
            result = flipped.view(values.dtype).byteswap().reshape(-1)
        elif name == "popc":
            result = digits.sum(1).astype(np.uint32)
        else:
            result = np.where(digits.any(1), digits.argmax(1), digits.shape[1]).astype(np.uint32)
        write(lanes, result, active)

    return step


COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}
UNORDERED = {f"{name}u": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}


@opcode("setp", modifiers=" ".join((*COMPARISONS, *UNORDERED, "num nan ftz and or xor")))
def _compare(operands: Operands) -> Step:
    result = _comparison(operands)
    combine = next((LOGIC[name] for name in operands.modifiers if name in LOGIC), None)
    other = operands.read(3, "pred") if combine else None
    write, write_inverse = operands.write_pair(0, "pred")

    def step(lanes: Lanes, active: Mask) -> None:
        holds, fails = result(lanes), ~result(lanes)
        if other is not None and combine is not None:
            holds, fails = combine(holds, other(lanes)), combine(fails, other(lanes))
        write(lanes, holds, active)
        write_inverse(lanes, fails, active)

    return step


def _comparison(operands: Operands) -> Reader:
    name, kind = operands.modifiers[0], operands.type
    first, second = operands.read(1, kind), operands.read(2, kind)
    if name in ("num", "nan"):
        return lambda lanes: (np.isnan(first(lanes)) | np.isnan(second(lanes))) == (name == "nan")
    compare = COMPARISONS[UNORDERED.get(name, name)]
    if kind not in FLOATS:
        return lambda lanes: compare(first(lanes), second(lanes))
    unordered = name in UNORDERED

    def floats(lanes: Lanes) -> Values:
        a, b = first(lanes), second(lanes)
        either_nan = np.isnan(a) | np.isnan(b)
        return (compare(a, b) | either_nan) if unordered else (compare(a, b) & ~either_nan)

    return floats


@opcode("selp")
def _select(operands: Operands) -> Step:
    kind = _unsigned(operands)
    first, second, choice = operands.read(1, kind), operands.read(2, kind), operands.read(3, "pred")
    write = operands.write(0, kind)
    return lambda lanes, active: write(lanes, np.where(choice(lanes), first(lanes), second(lanes)), active)


@opcode("mov")
def _move(operands: Operands) -> Step:
    kind = _unsigned(operands)
    targets, sources = operands.names(0), operands.names(1)
    if len(targets) > 1:
        return _unpack(operands, kind, targets)
    if len(sources) > 1:
        return _pack(operands, kind, sources)
    source, write = operands.read(1, kind), operands.write(0, kind)
    return lambda lanes, active: write(lanes, source(lanes), active)


def _unpack(operands: Operands, kind: str, targets: list[str]) -> Step:
    bits = 8 * TYPE_BYTES[kind] // len(targets)
    whole, dtype = operands.read(1, kind), DTYPES[f"u{bits}"]
    writes = [operands.write_name(name, f"u{bits}") for name in targets]

    def step(lanes: Lanes, active: Mask) -> None:
        values = whole(lanes)
        for place, write in enumerate(writes):
            write(lanes, (values >> values.dtype.type(bits * place)).astype(dtype), active)

    return step


def _pack(operands: Operands, kind: str, sources: list[str]) -> Step:
    bits, dtype = 8 * TYPE_BYTES[kind] // len(sources), DTYPES[kind]
    parts, write = [operands.read_name(name, f"u{bits}") for name in sources], operands.write(0, kind)

    def step(lanes: Lanes, active: Mask) -> None:
        whole = parts[0](lanes).astype(dtype)
        for place, part in enumerate(parts[1:], 1):
            whole = whole | (part(lanes).astype(dtype) << dtype.type(bits * place))
        write(lanes, whole, active)

    return step
