"""Opcodes of a warp or a program together: shuffles, votes, reductions, barriers; and those without effect here."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import maximum, minimum
from .counters import WARP
from .faults import DivergentBarrierError, InactiveLaneError, TrapError
from .lanes import Lanes, Mask
from .operands import Operands, Step, Values, opcode, spread


def _by_warp(lanes: Lanes, values: Values) -> Values:
    return spread(values, lanes).reshape(-1, WARP)


def _taking_part(lanes: Lanes, active: Mask) -> Values:
    return np.ones((lanes.count // WARP, WARP), bool) if active is None else active.reshape(-1, WARP)


@opcode("shfl", modifiers="sync bfly up down idx")
def _shuffle(operands: Operands) -> Step:
    mode = operands.one_of("bfly up down idx")
    write, write_valid = operands.write_pair(0, "b32")
    source, offset, clamp = operands.read(1, "b32"), operands.read(2, "u32"), operands.read(3, "u32")

    def step(lanes: Lanes, active: Mask) -> None:
        by, limit = (offset(lanes) & np.uint32(31)).astype(np.int64), clamp(lanes).astype(np.int64)
        segment, bound = (limit >> 8) & 31, limit & 31
        lowest = lanes.lane & segment
        highest = lowest | (bound & ~segment)
        chosen = {"bfly": lanes.lane ^ by, "up": lanes.lane - by, "down": lanes.lane + by}.get(mode)
        chosen = lowest | (by & ~segment) if chosen is None else chosen
        valid = chosen >= highest if mode == "up" else chosen <= highest
        partner = lanes.warp.astype(np.int64) * WARP + np.where(valid, chosen, lanes.lane)
        if active is not None and not active[partner][active].all():
            lane = int(np.argmax(active & ~active[partner]))
            raise lanes.fault(InactiveLaneError, operands.instruction, lane, "the shuffle reads an absent lane")
        write(lanes, spread(source(lanes), lanes)[partner], active)
        write_valid(lanes, valid, active)

    return step


@opcode("vote", modifiers="sync ballot any all uni")
def _vote(operands: Operands) -> Step:
    mode = operands.one_of("ballot any all uni")
    source, write = operands.read(1, "pred"), operands.write(0, "b32" if mode == "ballot" else "pred")

    def step(lanes: Lanes, active: Mask) -> None:
        here = _taking_part(lanes, active)
        votes = _by_warp(lanes, source(lanes))
        if mode == "ballot":
            result: Any = ((votes & here) << np.arange(WARP, dtype=np.uint64)).sum(1).astype(np.uint32)
        elif mode == "any":
            result = (votes & here).any(1)
        elif mode == "all":
            result = (votes | ~here).all(1)
        else:
            result = (votes | ~here).all(1) | ~(votes & here).any(1)
        write(lanes, np.repeat(result, WARP), active)

    return step


@opcode("activemask")
def _active_mask(operands: Operands) -> Step:
    write = operands.write(0, "b32")

    def step(lanes: Lanes, active: Mask) -> None:
        bits = (_taking_part(lanes, active) << np.arange(WARP, dtype=np.uint64)).sum(1).astype(np.uint32)
        write(lanes, np.repeat(bits, WARP), active)

    return step


@opcode("elect", modifiers="sync")
def _elect(operands: Operands) -> Step:
    """The lowest lane that takes part is chosen."""
    write, write_chosen = operands.write_pair(0, "b32")

    def step(lanes: Lanes, active: Mask) -> None:
        leader = np.repeat(_taking_part(lanes, active).argmax(1), WARP)
        write(lanes, leader.astype(np.uint32), active)
        write_chosen(lanes, leader == lanes.lane, active)

    return step


@opcode("redux", modifiers="sync add min max and or xor abs NaN")
def _reduce(operands: Operands) -> Step:
    kind, name = operands.type, operands.one_of("add min max and or xor")
    source, write = operands.read(1, kind), operands.write(0, kind)
    absolute, nan = "abs" in operands.modifiers, "NaN" in operands.modifiers
    combine: dict[str, Any] = {
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "min": lambda a, b: minimum(a, b, nan=nan),
        "max": lambda a, b: maximum(a, b, nan=nan),
    }

    def step(lanes: Lanes, active: Mask) -> None:
        if active is not None and (active.reshape(-1, WARP).any(1) != active.reshape(-1, WARP).all(1)).any():
            lane = int(np.argmax(active))
            raise lanes.fault(InactiveLaneError, operands.instruction, lane, "the reduction misses lanes of its warp")
        values = _by_warp(lanes, source(lanes))
        columns = np.abs(values).T if absolute else values.T
        result = columns[0]
        for column in columns[1:]:
            result = combine[name](result, column)
        write(lanes, np.repeat(result, WARP), active)

    return step


@opcode("bar", "barrier", modifiers="sync warp cta aligned")
def _barrier(operands: Operands) -> Step:
    if "warp" in operands.modifiers:
        return _nothing
    expected = int(operands.instruction.operands[1], 0) if len(operands) > 1 else None

    def step(lanes: Lanes, active: Mask) -> None:
        here = np.full(lanes.count, True) if active is None else active
        arrived = here.reshape(lanes.programs, -1).sum(1)
        wanted = (~lanes.exited).reshape(lanes.programs, -1).sum(1) if expected is None else expected
        reached = arrived > 0
        wrong = reached & (arrived != wanted)
        if wrong.any():
            program = int(np.argmax(wrong))
            lane = int(np.argmax(here & (lanes.program == program)))
            message = f"{arrived[program]} threads reach a barrier for {np.broadcast_to(wanted, wrong.shape)[program]}"
            raise lanes.fault(DivergentBarrierError, operands.instruction, lane, message)
        lanes.counters.barriers += int(np.count_nonzero(reached))
        lanes.shared.barrier(reached)

    return step


@opcode("trap")
def _trap(operands: Operands) -> Step:
    def step(lanes: Lanes, active: Mask) -> None:
        raise lanes.fault(TrapError, operands.instruction, int(lanes.indices(active)[0]), "the kernel stops itself")

    return step


def _nothing(lanes: Lanes, active: Mask) -> None:
    """Do nothing: what the instruction orders or hints at is so already."""


ORDERS = "gl cta sys gpu sc acq_rel proxy async global shared shared_cta level mbarrier_init release cluster"


@opcode("membar", "fence", "griddepcontrol", "nanosleep", modifiers=f"{ORDERS} wait launch_dependents")
def _no_effect(operands: Operands) -> Step:
    return _nothing


@opcode("prefetch", "prefetchu", modifiers="global L1 L2 L2_evict_last L2_evict_normal")
def _prefetch(operands: Operands) -> Step:
    return _nothing


@opcode("createpolicy", modifiers="fractional range L2_evict_first L2_evict_last L2_evict_normal L2_evict_unchanged")
def _cache_policy(operands: Operands) -> Step:
    """Write some policy: a hint that changes no result."""
    write = operands.write(0, "b64")
    return lambda lanes, active: write(lanes, np.zeros(1, np.uint64), active)
