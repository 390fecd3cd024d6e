"""A kernel that can be launched: control flow over the steps of its instructions."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import arithmetic, bits, conversions, matrix_ops, transfers, warp_ops
from .counters import WARP, Counters
from .faults import PtxError, TrapError
from .lanes import Checks, Lanes, Launch, Mask
from .memory import Buffer, Memory
from .operands import Operands, Reader, Step, build_step, spread
from .parser import TYPE_BYTES, Instruction, parse

# Buffers by reference; for a pointer also its virtual address as an int.
Argument = Buffer | int | float
# Enough lanes for NumPy's own cost per call to fade, few enough for their registers to stay in the cache.
LANES_AT_ONCE = 16384
STEP_LIMIT = 2_000_000
# Importing these enters their opcodes into the table.
OPCODE_MODULES = (arithmetic, bits, conversions, matrix_ops, transfers, warp_ops)


class Line(NamedTuple):
    """One instruction, ready to run. `target`: where a branch goes; the end of the code for an exit."""

    instruction: Instruction
    predicate: Reader | None
    step: Step | None
    target: int | None


class Program:
    """The PTX of one kernel, loaded once and launched often.

    `shared_bytes` is the dynamic shared memory per program. Raises UnknownInstructionError for what cannot be emulated.
    """

    def __init__(self, ptx: str, shared_bytes: int = 0) -> None:
        self.ptx = ptx
        self.module = parse(ptx)
        self.shared_bytes = shared_bytes
        self._lines = [self._line(instruction) for instruction in self.module.instructions]
        # Copy groups are counted for all programs that run side by side, so only one may.
        self._alone = any(instruction.opcode == "cp" for instruction in self.module.instructions)

    @classmethod
    def of(cls, kernel: Any) -> Program:
        """Load a kernel that `triton.compile` made for an NVIDIA target; the same PTX is loaded once."""
        return _loaded(kernel.asm["ptx"], kernel.metadata.shared)

    def mutant(self, pattern: str, replacement: str, occurrence: int = 0) -> Program:
        """Return this program with one match of a regular expression in its PTX replaced: a deliberate defect."""
        matches = list(re.finditer(pattern, self.ptx))
        if occurrence >= len(matches):
            raise ValueError(f"{pattern!r} occurs {len(matches)} times in the PTX of {self.module.name}")
        found = matches[occurrence]
        text = self.ptx[: found.start()] + found.expand(replacement) + self.ptx[found.end() :]
        return Program(text, self.shared_bytes)

    def launch(
        self,
        arguments: Sequence[Argument],
        grid: Sequence[int],
        num_warps: int | None = None,
        *,
        memory: Memory | None = None,
        programs: Sequence[int] | None = None,
        checks: Checks | None = None,
        fuzz: int | None = None,
        counted: bool = True,
    ) -> Counters:
        """Run the kernel over a grid and return what it did; raise a PtxError at the first fault.

        `arguments` follow the kernel's signature without its constants. `memory` holds further buffers, those whose
        addresses stand in tables. `programs` picks some of the grid's programs, in their order. `fuzz` seeds errors of
        approximate instructions, within their documented bounds; None gives the rounded exact results. Not `counted`:
        accesses of memory are left out of what is returned.
        """
        sizes = (*grid, 1, 1)
        whole = (int(sizes[0]), int(sizes[1]), int(sizes[2]))
        memory = Memory() if memory is None else memory
        launch = Launch(
            module=self.module,
            grid=whole,
            threads=self._threads(num_warps),
            shared_bytes=self.module.static_shared_bytes + self.shared_bytes,
            parameters=self._parameters(arguments, memory),
            memory=memory,
            checks=checks or Checks(),
            noise=None if fuzz is None else np.random.default_rng(fuzz),
            counted=counted,
        )
        numbers = np.arange(np.prod(whole)) if programs is None else np.asarray(programs, np.int64)
        memory.upload(launch.checks.global_races)
        at_once = 1 if self._alone else max(1, LANES_AT_ONCE // launch.threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(numbers), at_once):
                self._run(Lanes(launch, numbers[first : first + at_once]))
        memory.download()
        return launch.counters

    def _threads(self, num_warps: int | None) -> int:
        threads = self.module.threads if num_warps is None else num_warps * WARP
        if threads is None:
            raise PtxError(f"kernel {self.module.name} does not say how many threads it wants: give num_warps")
        if self.module.threads not in (None, threads):
            raise PtxError(f"kernel {self.module.name} wants {self.module.threads} threads, not {threads}")
        return threads

    def _parameters(self, arguments: Sequence[Argument], memory: Memory) -> dict[str, NDArray[Any]]:
        """Return each parameter's bits, [1]; parameters that Triton adds behind the signature are null pointers."""
        wanted = self.module.parameters
        if len(arguments) > len(wanted):
            raise PtxError(f"kernel {self.module.name} has {len(wanted)} parameters, {len(arguments)} were given")
        # Large ones first, so that a part of a buffer is found inside it.
        buffers = [argument for argument in arguments if not isinstance(argument, (int, float, np.number))]
        for buffer in sorted(buffers, key=lambda buffer: -buffer.nbytes):
            memory.address_of(buffer)
        padded = [*arguments, *[0] * (len(wanted) - len(arguments))]
        return {name: _bits(argument, kind, memory) for (kind, name), argument in zip(wanted, padded)}

    def _line(self, instruction: Instruction) -> Line:
        operands = Operands(instruction, self.module)
        predicate = None
        if instruction.predicate is not None:
            predicate = operands.read_name(("!" if instruction.negated else "") + instruction.predicate, "pred")
        if instruction.opcode in ("ret", "exit"):
            return Line(instruction, predicate, None, len(self.module.instructions))
        if instruction.opcode == "bra":
            if instruction.operands[0] not in self.module.labels:
                raise operands.unknown("label")
            return Line(instruction, predicate, None, self.module.labels[instruction.operands[0]])
        return Line(instruction, predicate, build_step(instruction, self.module), None)

    def _run(self, lanes: Lanes) -> None:
        """Run until every lane has left; those at the lowest line go first, which brings branches together."""
        waiting: dict[int, Mask] = {0: None}
        counts = np.zeros(len(self._lines) + 1, np.int64)
        for _ in range(STEP_LIMIT):
            line_number = min(waiting)
            if line_number == len(self._lines):
                break
            self._run_straight(lanes, line_number, waiting.pop(line_number), waiting, counts)
        else:
            raise TrapError(f"kernel {self.module.name} does not end: {STEP_LIMIT} branches taken")
        for line, count in zip(self._lines, counts):
            lanes.counters.instructions[line.instruction.opcode] += int(count)

    def _run_straight(
        self, lanes: Lanes, number: int, mask: Mask, waiting: dict[int, Mask], counts: NDArray[np.int64]
    ) -> None:
        """Run from a line to the next branch, or to where others wait, and leave all lanes waiting where they are."""
        warps = lanes.live_warps(mask)
        while number < len(self._lines):
            line = self._lines[number]
            counts[number] += warps
            active, some = mask, True
            if line.predicate is not None:
                active, some = _narrowed(mask, spread(line.predicate(lanes), lanes))
            number += 1
            if line.target is not None:
                if some:
                    _join(waiting, line.target, active)
                    if line.target == len(self._lines):
                        lanes.exited = np.ones(lanes.count, bool) if active is None else lanes.exited | active
                rest = _without(mask, active if some else np.zeros(lanes.count, bool), lanes.count)
                if rest is not None:
                    _join(waiting, number, None if rest.all() else rest)
                return
            if some and line.step is not None:
                line.step(lanes, active)
            if number in waiting:
                break
        _join(waiting, number, mask)


def _narrowed(mask: Mask, predicate: NDArray[np.bool_]) -> tuple[Mask, bool]:
    """Return the lanes of `mask` where a predicate holds, and whether there are any."""
    holds = predicate if mask is None else predicate & mask
    if holds.all():
        return None, True
    return holds, bool(holds.any())


def _without(mask: Mask, gone: Mask, count: int) -> NDArray[np.bool_] | None:
    """Return the lanes of `mask` that are not gone; None if that is no lane."""
    if gone is None:
        return None
    rest = ~gone if mask is None else mask & ~gone
    return rest if rest.any() else None


def _join(waiting: dict[int, Mask], number: int, mask: Mask) -> None:
    if number not in waiting or mask is None:
        waiting[number] = mask
        return
    other = waiting[number]
    if other is not None:
        joined = other | mask
        waiting[number] = None if joined.all() else joined


def _bits(argument: Argument, kind: str, memory: Memory) -> NDArray[Any]:
    """Return an argument's bits, as the launcher would pass them."""
    unsigned = np.dtype(f"u{TYPE_BYTES[kind]}")
    if not isinstance(argument, (int, float, np.number)):
        return np.array([memory.address_of(argument)], unsigned)
    if isinstance(argument, (float, np.floating)):
        return np.array([argument], f"f{unsigned.itemsize}").view(unsigned)
    if kind[0] == "f":
        return np.array([argument], kind).view(unsigned)
    return np.array([int(argument) & ((1 << 8 * unsigned.itemsize) - 1)], unsigned)


@functools.lru_cache(maxsize=256)
def _loaded(ptx: str, shared_bytes: int) -> Program:
    return Program(ptx, shared_bytes)
