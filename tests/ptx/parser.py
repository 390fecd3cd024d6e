"""PTX text, as Triton emits it, to a list of instructions."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

from .faults import PtxError

TYPE_BYTES = {
    **dict.fromkeys(("b8", "u8", "s8", "pred"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 8),
}
_IDENTIFIER = r"[%$\w]+"


@dataclass(frozen=True)
class Instruction:
    """One statement: `@!predicate opcode.modifier.modifier operand, operand;`."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    text: str
    location: str

    @property
    def types(self) -> tuple[str, ...]:
        """The modifiers that name a type, in order."""
        return tuple(name for name in self.modifiers if name in TYPE_BYTES)

    def __str__(self) -> str:
        return f"{self.location}: `{self.text}`"


@dataclass(frozen=True)
class Module:
    """One kernel: parameters (type, name), types of registers, code, and what names stand for.

    `labels` are indices into the code, `shared` offsets into the shared memory.
    """

    name: str
    target: str
    parameters: tuple[tuple[str, str], ...]
    registers: dict[str, str]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    shared: dict[str, int]
    static_shared_bytes: int
    threads: int | None

    @functools.cached_property
    def slots(self) -> dict[str, int]:
        """The number of each register."""
        return {name: slot for slot, name in enumerate(self.registers)}


def parse(ptx: str) -> Module:
    """Return the only kernel of a PTX text; raise PtxError if there is not exactly one, or it keeps a stack."""
    code = re.split(r"\n\s*\.section", ptx)[0]
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\n\{(.*?)\n\}", code, re.S))
    if len(entries) != 1:
        raise PtxError(f"a PTX text with one kernel is wanted, this one has {len(entries)}")
    name, parameters, directives, body = entries[0].groups()
    # One that no instruction names is left over from what the compiler did before.
    stacks = re.findall(r"\.local\s[^;]*?([\w$]+)\[", body)
    if any(len(re.findall(rf"(?<![\w$]){re.escape(stack)}(?![\w$])", body)) > 1 for stack in stacks):
        raise PtxError(f"kernel {name} keeps arrays in local memory, which the emulator does not have")
    target = re.search(r"\.target\s+(\w+)", ptx)
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    shared, static_bytes = _shared_symbols(code)
    reader = _BodyReader(body, _file_names(ptx))
    return Module(
        name=name,
        target=target.group(1) if target else "",
        parameters=tuple(re.findall(r"\.param\s+\.(\w+)[^,\n]*?\s([\w$]+_param_\d+)", parameters)),
        registers=reader.registers,
        instructions=tuple(reader.instructions),
        labels=reader.labels,
        shared=shared,
        static_shared_bytes=static_bytes,
        threads=int(threads.group(1)) if threads else None,
    )


def _file_names(ptx: str) -> dict[str, str]:
    return {number: PurePath(path).name for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)}


def _shared_symbols(code: str) -> tuple[dict[str, int], int]:
    """Return the offset of each shared symbol and the bytes of the sized ones; the unsized one begins behind them."""
    offsets, end = {}, 0
    declared = re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)\[(\d*)\]", code)
    for align, kind, name, count in sorted(declared, key=lambda found: not found[3]):
        offsets[name] = -(-end // int(align)) * int(align)
        end = offsets[name] + int(count or 0) * TYPE_BYTES[kind]
    return offsets, end


class _BodyReader:
    """Walks over a kernel's body once and collects registers, labels and instructions."""

    def __init__(self, body: str, file_names: dict[str, str]) -> None:
        self.registers: dict[str, str] = {}
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        # Inline assembly declares registers inside braces: names of an inner scope hide outer ones.
        self._scopes: list[dict[str, str]] = []
        self._scope_count = 0
        pending = ""
        for line, location in _code_lines(body, file_names):
            pending = self._consume(f"{pending} {line}", location)

    def _consume(self, text: str, location: str) -> str:
        """Take every complete statement from the front of `text` and return the rest."""
        while text := text.strip():
            if label := re.match(rf"({_IDENTIFIER})\s*:(?!:)", text):
                if label.group(1) in self.labels:
                    raise PtxError(f"{location}: the label {label.group(1)} is defined twice")
                self.labels[label.group(1)] = len(self.instructions)
                text = text[label.end() :]
            elif text[0] == "{":
                self._scopes.append({})
                self._scope_count += 1
                text = text[1:]
            elif text[0] == "}":
                self._scopes.pop()
                text = text[1:]
            elif ";" in text:
                statement, text = text.split(";", 1)
                self._statement(statement.strip(), location)
            else:
                break
        return text

    def _statement(self, text: str, location: str) -> None:
        if declaration := re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.S):
            for name in declaration.group(2).split(","):
                self._declare(name.strip(), declaration.group(1))
        elif text and not text.startswith((".shared", ".local", ".pragma")):
            self.instructions.append(_instruction(self._renamed(text), location))

    def _declare(self, name: str, kind: str) -> None:
        if several := re.match(rf"({_IDENTIFIER})<(\d+)>$", name):
            self.registers.update({f"{several.group(1)}{k}": kind for k in range(int(several.group(2)))})
        elif self._scopes:
            inner = f"{name}${self._scope_count}"
            self._scopes[-1][name] = inner
            self.registers[inner] = kind
        else:
            self.registers[name] = kind

    def _renamed(self, text: str) -> str:
        if not any(self._scopes):
            return text
        names = {outer: inner for scope in self._scopes for outer, inner in scope.items()}
        opcode, *operands = re.split(r"(\s+)", text)
        operand_text = "".join(operands)
        if opcode.startswith("@"):
            return re.sub(_IDENTIFIER, lambda found: names.get(found.group(), found.group()), text)
        return opcode + re.sub(_IDENTIFIER, lambda found: names.get(found.group(), found.group()), operand_text)


def _code_lines(body: str, file_names: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each line of code without its comment, and the place in the Triton source that it comes from."""
    location, callers = "?", dict[str, str]()
    # Inside inline assembly LLVM counts the lines of the assembly as lines of the source: only the first is true.
    inside, located = False, False
    for line in body.split("\n"):
        if re.match(r"\s*// (begin|end) inline asm", line):
            inside, located = "begin" in line, False
        elif place := re.match(r"\s*\.loc\s+(\d+) (\d+) (\d+)(?:.*inlined_at (\d+) (\d+) (\d+))?", line):
            if not (inside and located):
                location, located = _location(place.groups(), file_names, callers), True
        elif not re.match(r"\s*\.(loc|file|pragma)\b", line):
            yield line.split("//")[0], location


def _location(numbers: tuple[str | None, ...], file_names: dict[str, str], callers: dict[str, str]) -> str:
    """Return `kernel.py:12:34`, and for inlined functions `kernel.py:12:34 > standard.py:216:16`, outermost first."""
    here, caller = _place(numbers[:3], file_names), None
    if numbers[3] is not None:
        caller = _place(numbers[3:], file_names)
        # Only the nearest caller is told: farther ones are what that caller was last inlined into.
        callers[here] = f"{callers[caller]} > {caller}" if caller in callers else caller
    return f"{callers[here]} > {here}" if caller else here


def _place(numbers: tuple[str | None, ...], file_names: dict[str, str]) -> str:
    file, line, column = numbers
    return f"{file_names.get(str(file), f'file {file}')}:{line}:{column}"


def _instruction(text: str, location: str) -> Instruction:
    guard = re.match(rf"@(!?)({_IDENTIFIER})\s+", text)
    code = text[guard.end() :] if guard else text
    head, _, operands = re.sub(r"\s+", " ", code).partition(" ")
    opcode, *modifiers = head.replace("::", "_").split(".")
    return Instruction(
        opcode=opcode,
        modifiers=tuple(modifiers),
        operands=tuple(split_operands(operands)),
        predicate=guard.group(2) if guard else None,
        negated=bool(guard and guard.group(1)),
        text=re.sub(r"\s+", " ", text),
        location=location,
    )


def split_operands(text: str) -> list[str]:
    """Split at the commas outside of every kind of bracket."""
    operands, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            operands.append(text[start:position].strip())
            start = position + 1
    return [*operands, text[start:].strip()] if text.strip() else []
