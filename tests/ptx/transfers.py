"""Opcodes that move data: loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .counters import SharedTraffic, Traffic
from .faults import GlobalRaceError, MisalignedError, OutOfBoundsError, SharedRaceError, UninitialisedReadError
from .lanes import Lanes, Mask
from .operands import Operands, Step, Values, opcode, spread
from .parser import TYPE_BYTES, Instruction

# Cache hints and orders change nothing for programs that do not race.
HINTS = (
    "v2 v4 v8 nc ca cg cs cv lu wb wt volatile relaxed acquire release acq_rel weak cta gpu sys cluster noftz L2_128B "
    "L2_256B L2_cache_hint L1_evict_first L1_evict_last L1_no_allocate L1_evict_normal L1_evict_unchanged"
)
SPACES = "global shared shared_cta param"


def _space(operands: Operands) -> str:
    """Return the state space; a generic address is a global one here."""
    return operands.one_of(SPACES, "global").removesuffix("_cta")


class Access:
    """One instruction's accesses of one width: checks, counts, and where the bytes are."""

    def __init__(self, instruction: Instruction, space: str, width: int, write: bool, atomic: bool = False) -> None:
        self.instruction, self.space, self.width = instruction, space, width
        self.write, self.atomic = write, atomic
        self._verb = "atomic access" if atomic else "store" if write else "load"

    def locate(self, lanes: Lanes, address: Values, active: Mask) -> tuple[Values, Values]:
        """Return the lanes that take part, and the byte each one starts at in its memory's array."""
        if lanes.launch.counted:
            self._traffic(lanes).record(address, active, self.width)
        taking_part = lanes.indices(active)
        address = address if active is None else address[active]
        wrong = (address & (self.width - 1)) != 0
        if wrong.any():
            raise self._fault(lanes, MisalignedError, taking_part[np.argmax(wrong)], "is misaligned", address[wrong][0])
        if self.space == "shared":
            return taking_part, self._locate_shared(lanes, address, taking_part)
        outside = lanes.memory.outside(address, self.width)
        if outside is not None:
            raise self._fault(lanes, OutOfBoundsError, taking_part[outside], "leaves its buffer", address[outside])
        if not self.atomic:
            racing = lanes.memory.note(address, self.width, lanes.global_program[taking_part], self.write)
            if racing is not None:
                message = "touches what another program touches"
                raise self._fault(lanes, GlobalRaceError, taking_part[racing], message, address[racing])
        return taking_part, address - lanes.memory.words(1)[1]

    def _traffic(self, lanes: Lanes) -> Traffic | SharedTraffic:
        counters = lanes.counters
        if self.space == "shared":
            return counters.shared_stores if self.write else counters.shared_loads
        return counters.atomics if self.atomic else counters.stores if self.write else counters.loads

    def _locate_shared(self, lanes: Lanes, address: Values, taking_part: Values) -> Values:
        outside = (address < 0) | (address + self.width > lanes.shared.size)
        if outside.any():
            lane, where = taking_part[np.argmax(outside)], address[outside][0]
            raise self._fault(lanes, OutOfBoundsError, lane, f"leaves the {lanes.shared.size} shared bytes", where)
        place = lanes.shared.place(lanes.program[taking_part], address)
        checks = lanes.launch.checks
        if not self.write and not self.atomic:
            unwritten = lanes.shared.unwritten(place, self.width) if checks.uninitialised else None
            if unwritten is not None:
                message = "reads shared memory that nobody has written"
                raise self._fault(lanes, UninitialisedReadError, taking_part[unwritten], message, address[unwritten])
            racing = lanes.shared.note_read(place, self.width, lanes.warp[taking_part])
            if racing is not None and checks.shared_races:
                message = "reads what another warp wrote since the last barrier"
                raise self._fault(lanes, SharedRaceError, taking_part[racing], message, address[racing])
        return place

    def store_shared(self, lanes: Lanes, place: Values, taking_part: Values, values: Values) -> None:
        """Write uint8 [accesses, width] into shared memory, in order with other warps or not at all."""
        racing = lanes.shared.note_write(place, values, lanes.warp[taking_part])
        if racing is not None and lanes.launch.checks.shared_races:
            message = f"overwrites what another warp has {racing[0]} since the last barrier"
            raise lanes.fault(SharedRaceError, self.instruction, int(taking_part[racing[1]]), f"the store {message}")

    def _fault(self, lanes: Lanes, kind: Any, lane: Any, message: str, address: Any) -> Exception:
        where = f"shared byte {address}" if self.space == "shared" else lanes.memory.describe(int(address))
        text = f"the {self.width}-byte {self._verb} {message}, at {where}"
        return lanes.fault(kind, self.instruction, int(lane), text)


def words_of(lanes: Lanes, space: str, itemsize: int) -> Values:
    """Return a memory as unsigned integers of a size."""
    return lanes.shared.words(itemsize) if space == "shared" else lanes.memory.words(itemsize)[0]


@opcode("ld", modifiers=f"{SPACES} {HINTS}")
def _load(operands: Operands) -> Step:
    if _space(operands) == "param":
        return _load_parameter(operands)
    kind, space, names = operands.type, _space(operands), operands.names(0)
    size = TYPE_BYTES[kind]
    access = Access(operands.instruction, space, size * len(names), write=False)
    address = operands.address(1)
    # bfloat16 and floats are moved as bits; only a signed load widens with the sign.
    moved = kind if kind[0] == "s" else f"u{8 * size}"
    writes = [operands.write_name(name, moved) for name in names]
    dtype = np.dtype(f"i{size}") if kind[0] == "s" else np.dtype(f"u{size}")

    def step(lanes: Lanes, active: Mask) -> None:
        taking_part, place = access.locate(lanes, address(lanes), active)
        words, index = words_of(lanes, space, size).view(dtype), place // size
        for position, write in enumerate(writes):
            loaded = words[index + position]
            if active is not None:
                scattered = np.zeros(lanes.count, dtype)
                scattered[taking_part] = loaded
                loaded = scattered
            write(lanes, loaded, active)

    return step


def _load_parameter(operands: Operands) -> Step:
    name = operands.instruction.operands[1].strip("[] ")
    if name not in [known for _, known in operands.module.parameters]:
        raise operands.unknown("parameter")
    kind = f"u{8 * TYPE_BYTES[operands.type]}"
    write = operands.write(0, kind)
    return lambda lanes, active: write(lanes, lanes.launch.parameters[name], active)


@opcode("st", modifiers=f"{SPACES} {HINTS}")
def _store(operands: Operands) -> Step:
    size, space, names = TYPE_BYTES[operands.type], _space(operands), operands.names(1)
    access = Access(operands.instruction, space, size * len(names), write=True)
    address = operands.address(0)
    sources = [operands.read_name(name, f"u{8 * size}") for name in names]

    def step(lanes: Lanes, active: Mask) -> None:
        taking_part, place = access.locate(lanes, address(lanes), active)
        values = [spread(source(lanes), lanes)[taking_part] for source in sources]
        if space == "shared":
            access.store_shared(lanes, place, taking_part, np.stack(values, 1).view(np.uint8))
            return
        words, index = lanes.memory.words(size)[0], place // size
        for position, value in enumerate(values):
            words[index + position] = value

    return step


ATOMIC: dict[str, Callable[..., Any]] = {
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
    "cas": lambda old, expected, x: x if old == expected else old,
}


@opcode("atom", "red", modifiers=f"{SPACES} {HINTS} {' '.join(ATOMIC)}")
def _atomic(operands: Operands) -> Step:
    kind, space = operands.type, _space(operands)
    if kind in ("f16", "bf16", "f16x2", "bf16x2") or {"v2", "v4", "v8"} & set(operands.modifiers):
        raise operands.unknown("form")
    returns = operands.instruction.opcode == "atom"
    change, size = ATOMIC[operands.one_of(" ".join(ATOMIC))], TYPE_BYTES[kind]
    access = Access(operands.instruction, space, size, write=True, atomic=True)
    address = operands.address(int(returns))
    sources = [operands.read(index, kind) for index in range(int(returns) + 1, len(operands))]
    write = operands.write(0, kind) if returns else None

    def step(lanes: Lanes, active: Mask) -> None:
        taking_part, place = access.locate(lanes, address(lanes), active)
        values = [spread(source(lanes), lanes) for source in sources]
        words = words_of(lanes, space, size).view(values[0].dtype)
        before = np.zeros(lanes.count, values[0].dtype)
        for lane, index in zip(taking_part, place // size):
            before[lane] = words[index]
            words[index] = change(words[index], *(value[lane] for value in values))
        if write is not None:
            write(lanes, before, active)

    return step


@opcode("cp", modifiers=f"async commit_group wait_group wait_all {SPACES} {HINTS}")
def _copy(operands: Operands) -> Step:
    if "commit_group" in operands.modifiers:
        return _commit_copies
    if "wait_all" in operands.modifiers:
        return lambda lanes, active: _wait(lanes, active, 0)
    if "wait_group" in operands.modifiers:
        left_open = int(operands.instruction.operands[0])
        return lambda lanes, active: _wait(lanes, active, left_open)
    return _start_copy(operands)


def _commit_copies(lanes: Lanes, active: Mask) -> None:
    lanes.copy_groups.append(lanes.open_copies)
    lanes.open_copies = []


def _wait(lanes: Lanes, active: Mask, left_open: int) -> None:
    """Make the copies of all but the last groups; before that, shared memory does not show them."""
    while len(lanes.copy_groups) > left_open:
        for make in lanes.copy_groups.pop(0):
            make()


def _start_copy(operands: Operands) -> Step:
    width = int(operands.instruction.operands[2], 0)
    source_access = Access(operands.instruction, "global", width, write=False)
    target_access = Access(operands.instruction, "shared", width, write=True)
    target, source = operands.address(0), operands.address(1)
    source_bytes = operands.read(3, "u32") if len(operands) > 3 else None

    def step(lanes: Lanes, active: Mask) -> None:
        reading = active
        if source_bytes is not None:
            # A source size of 0 fills with zeros; Triton masks loads that way.
            wanted = spread(source_bytes(lanes) > 0, lanes)
            reading = wanted if active is None else active & wanted
        values = np.zeros((lanes.count, width), np.uint8)
        if reading is None or reading.any():
            readers, start = source_access.locate(lanes, source(lanes), reading)
            values[readers] = lanes.memory.words(1)[0][start[:, None] + np.arange(width)]
        writers, place = target_access.locate(lanes, target(lanes), active)
        lanes.open_copies.append(lambda: target_access.store_shared(lanes, place, writers, values[writers]))

    return step
