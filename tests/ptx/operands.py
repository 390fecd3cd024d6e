"""The operands of one instruction as functions of the lanes, and the table of opcodes.

An opcode is a function from `Operands` to a `Step`: it looks at types and modifiers once, when a kernel is loaded,
and returns what is done each time the instruction runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import UnknownInstructionError
from .lanes import SPECIAL, Lanes, Mask
from .number_formats import bfloat16_to_float32, float32_to_bfloat16
from .parser import TYPE_BYTES, Instruction, Module, split_operands

Values = NDArray[Any]
# Values of an operand: [lanes], or [1] for an immediate.
Reader = Callable[[Lanes], Values]
Writer = Callable[[Lanes, Values, Mask], None]
Step = Callable[[Lanes, Mask], None]
Builder = Callable[["Operands"], Step]

OPCODES: dict[str, Builder] = {}
DTYPES: dict[str, Any] = {
    **{f"{letter}{8 * size}": np.dtype(f"u{size}") for letter in "bu" for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    **dict.fromkeys(("f16x2", "bf16x2", "tf32"), np.dtype("u4")),
    "f32x2": np.dtype("u8"),
    "pred": np.dtype(bool),
}


def spread(values: Values, lanes: Lanes) -> Values:
    """Return an operand's values as one for each lane; NumPy's own function takes its time over what needs nothing."""
    return values if values.shape == (lanes.count,) else np.broadcast_to(values, (lanes.count,))


def opcode(*names: str, modifiers: str = "") -> Callable[[Builder], Builder]:
    """Enter a builder into the table under some opcodes; modifiers not named, other than types, are refused."""
    known = set(modifiers.split())

    def enter(build: Builder) -> Builder:
        def checked(operands: Operands) -> Step:
            strange = set(operands.instruction.modifiers) - known - set(TYPE_BYTES)
            if strange:
                raise operands.unknown(f"modifier .{sorted(strange)[0]}")
            return build(operands)

        for name in names:
            OPCODES[name] = checked
        return build

    return enter


def build_step(instruction: Instruction, module: Module) -> Step:
    """Return what an instruction does; raise UnknownInstructionError if the emulator does not know."""
    operands = Operands(instruction, module)
    if instruction.opcode not in OPCODES:
        raise operands.unknown("opcode")
    try:
        return OPCODES[instruction.opcode](operands)
    except (IndexError, KeyError, ValueError) as error:
        raise operands.unknown("form") from error


class Operands:
    """Readers and writers of one instruction's operands."""

    def __init__(self, instruction: Instruction, module: Module) -> None:
        self.instruction = instruction
        self.module = module
        self.modifiers = instruction.modifiers
        self.types = instruction.types
        self._slots = module.slots

    @property
    def type(self) -> str:
        """The last type among the modifiers: the operation's own."""
        return self.types[-1]

    def __len__(self) -> int:
        return len(self.instruction.operands)

    def unknown(self, what: str) -> UnknownInstructionError:
        """Return the error for something that the emulator has no meaning for."""
        text = f"the emulator does not know this {what}" if " " not in what else f"the emulator does not know {what}"
        return UnknownInstructionError(f"{self.instruction.location}: {text}: `{self.instruction.text}`")

    def one_of(self, names: str, default: str | None = None) -> str:
        """Return the modifier that is one of `names`."""
        found = [name for name in self.modifiers if name in names.split()]
        if not found and default is None:
            raise self.unknown("form")
        return found[0] if found else str(default)

    def names(self, index: int) -> list[str]:
        """Return the registers of a vector operand `{a, b}`, or the only one."""
        text = self.instruction.operands[index]
        return [name.strip() for name in split_operands(text[1:-1])] if text[0] == "{" else [text]

    def read(self, index: int, kind: str) -> Reader:
        """Return the reader of an operand as a type; bf16 comes widened to float32."""
        return self.read_name(self.instruction.operands[index], kind)

    def read_name(self, name: str, kind: str) -> Reader:
        """Return the reader of a register, special register, shared symbol or immediate as a type."""
        if name[0] == "!":
            inverted = self.read_name(name[1:], "pred")
            return lambda lanes: ~inverted(lanes)
        bits = self._read_bits(name, kind)
        if kind == "bf16":
            return lambda lanes: bfloat16_to_float32(bits(lanes))
        dtype = DTYPES[kind]
        if dtype.kind in "ub":
            return bits
        return lambda lanes: bits(lanes).view(dtype)

    def _read_bits(self, name: str, kind: str) -> Reader:
        unsigned = np.dtype(f"u{TYPE_BYTES[kind]}") if kind != "pred" else np.dtype(bool)
        if name in self._slots:
            slot, declared = self._slots[name], self.module.registers[name]
            if declared == kind or TYPE_BYTES[declared] == unsigned.itemsize:
                return lambda lanes: lanes.registers[slot]
            return lambda lanes: lanes.registers[slot].astype(unsigned)
        if name in SPECIAL:
            return lambda lanes: lanes.special(name).astype(unsigned, copy=False)
        value = np.array([self._constant(name, kind)], unsigned)
        return lambda lanes: value

    def _constant(self, text: str, kind: str) -> int:
        """Return the bits of an immediate, or the offset of a shared symbol."""
        if symbol := re.match(r"([A-Za-z_$][\w$]*)\s*(?:\+\s*(\d+))?$", text):
            if symbol.group(1) not in self.module.shared:
                raise self.unknown(f"the name {symbol.group(1)}")
            return self.module.shared[symbol.group(1)] + int(symbol.group(2) or 0)
        if re.match(r"0[fFdD][0-9a-fA-F]+$", text):
            return int(text[2:], 16)
        if kind in ("f32", "f64", "f16"):
            return int(np.array([float(text)], DTYPES[kind]).view(f"u{TYPE_BYTES[kind]}")[0])
        number = int(text.rstrip("U"), 0)
        return bool(number) if kind == "pred" else number & ((1 << 8 * TYPE_BYTES[kind]) - 1)

    def write(self, index: int, kind: str) -> Writer:
        """Return the writer of an operand as a type; bf16 is rounded from float32."""
        return self.write_name(self.instruction.operands[index], kind)

    def write_name(self, name: str, kind: str) -> Writer:
        """Return the writer of a register; a wider register is sign- or zero-extended."""
        if name == "_":
            return lambda lanes, values, active: None
        slot = self._slots[name]
        size = TYPE_BYTES[self.module.registers[name]]
        dtype = np.dtype(bool) if self.module.registers[name] == "pred" else np.dtype(f"u{size}")
        extended = np.dtype(f"i{size}") if kind[0] == "s" else dtype

        def write(lanes: Lanes, values: Values, active: Mask) -> None:
            if kind == "bf16":
                values = float32_to_bfloat16(values)
            if values.dtype.kind == "f":
                values = values.view(f"u{values.dtype.itemsize}")
            if values.dtype.itemsize != dtype.itemsize:
                values = values.astype(extended)
            if values.dtype != dtype:
                values = values.view(dtype)
            if active is not None:
                values = np.where(active, values, lanes.registers[slot])
            elif values.shape != (lanes.count,):
                values = np.full(lanes.count, values[0], dtype)
            lanes.registers[slot] = values

        return write

    def write_pair(self, index: int, kind: str) -> tuple[Writer, Writer]:
        """Return the writers of an operand `d|p`; the second does nothing if there is only `d`."""
        first, _, second = self.instruction.operands[index].partition("|")
        return self.write_name(first.strip(), kind), self.write_name(second.strip() or "_", "pred")

    def address(self, index: int) -> Reader:
        """Return the reader of `[register + offset]` as int64."""
        found = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]$", self.instruction.operands[index])
        if not found:
            raise self.unknown("address")
        name, offset = found.group(1), int(found.group(2) or "0", 0)
        if name in self._slots:
            slot = self._slots[name]
            return lambda lanes: lanes.registers[slot].astype(np.int64) + offset
        value = self._constant(name, "u64") + offset
        return lambda lanes: np.full(lanes.count, value, np.int64)

    def all_names(self, indices: Iterable[int]) -> list[list[str]]:
        """Return the registers of several vector operands."""
        return [self.names(index) for index in indices]
