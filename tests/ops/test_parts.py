"""Parts of larger tensors, cut at the tiles of the whole, are stepped as the whole is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lisa_kernels.ops import tiles
from lisa_kernels.ops.adamw8 import reference
from lisa_kernels.ops.tiles.parts import cut_at_tiles, displace

from .kernel_checks import BF16, FP32, Case, State, Step, assert_equal_bits, displaced
from .kernel_runs import Machine, Poisoned
from .kernel_runs import displace as at_other_addresses

TILE, COUNT = 2048, 2 * 4096 + 512
# Where a tensor of `COUNT` elements is cut in two: at a tile, and within one, before or behind the end of the first.
CUTS = [4096, 2048 + 768, 256]
MOMENTS = pytest.mark.parametrize("block_size", [256, None], ids=["8 bits", "32 bits"])


def part_of(state: State, step: Step, block_size: int | None, span: slice) -> tuple[State, list[torch.Tensor]]:
    """Return copies of a part of a tensor's state and of its gradient."""
    each = block_size or 1
    blocks = slice(span.start // each, None if span.stop is None else span.stop // each)
    scaled = block_size is not None
    parts = [
        [tensor[blocks if scaled and number in (2, 4) else span].clone() for tensor in tensors]
        for number, tensors in enumerate(state)
    ]
    return tuple(parts), [step.grads[0][span].clone()]


@MOMENTS
@pytest.mark.parametrize("cut", CUTS)
def test_parts_cut_at_tiles_are_stepped_as_the_whole(cut: int, block_size: int | None) -> None:
    """By the definition, which takes any parts: what is cut, copied and written back is all of it, once."""
    case = Case((COUNT,), (BF16,), (FP32,), block_size)
    whole, step = case.state(), case.steps()[0]
    elements = (1, 1, 1, 1) if block_size is None else (1, 1, 1, block_size, 1, block_size)
    halves = []
    for start, span in ((0, slice(0, cut)), (cut, slice(cut, None))):
        state, grads = part_of(whole, step, block_size, span)
        parts = cut_at_tiles([state[0], grads, *state[1:]], [start], TILE, elements)
        assert all(begin % TILE == 0 for begin in parts.starts)
        rows = torch.tensor(parts.rows)
        take = reference.adamw32_ if block_size is None else reference.adamw8_
        options = [True] if block_size is None else [block_size, True]
        take(*parts.lists, step.scalars[rows], step.keys[rows], step.skip, *options, parts.starts)
        parts.write_back()
        halves.append(state)
    take(whole[0], step.grads, *whole[1:], step.scalars, step.keys, step.skip, *options)
    for tensors, one, other in zip(whole, *halves):
        assert_equal_bits(torch.cat([one[0], other[0]]), tensors[0], "elements")


@MOMENTS
def test_compiled_kernels_step_a_part_in_place(block_size: int | None) -> None:
    """One that begins where a tile of the whole does: in an emulator of a GPU, bit for bit what the definition does."""
    case = Case((COUNT,), (FP32,), (FP32,), block_size)
    state, step = case.state(), case.steps()[0]
    part, grads = part_of(state, step, block_size, slice(4096, None))
    machine, memory = Machine(90), Poisoned(torch.device("cpu"))
    ours, there = tuple(memory.place(tensors) for tensors in part), memory.place(grads)
    kernels, inputs = machine.module("adamw8"), (step.scalars, step.keys, step.skip)
    if block_size is None:
        launches = kernels.adamw32_launches(ours[0], there, *ours[1:], *inputs, True, machine.warp, [4096])
    else:
        launches = kernels.adamw8_launches(ours[0], there, *ours[1:], *inputs, 256, True, machine.warp, [4096])
    # The emulator has addresses of its own: it finds the tensors by where they are, and displaces them again.
    shifts = displaced(replace(case, start=4096))
    back = {column: -nbytes for column, nbytes in shifts.items()}
    for launch in launches:
        table = at_other_addresses(launch.arguments["table"], back)
        machine.run([replace(launch, arguments={**launch.arguments, "table": table})], memory.tensors, shifts)
    memory.assert_untouched()
    take = reference.adamw32_ if block_size is None else reference.adamw8_
    take(part[0], grads, *part[1:], *inputs, *([] if block_size is None else [block_size]), True, [4096])
    for mine, theirs in zip(ours[1:], part[1:]):
        assert_equal_bits(mine[0].view(theirs[0].dtype), theirs[0], "elements of moments")
    # The GPU's root is approximate, by 2⁻²⁰ of an update, and updates are as large as weights here.
    assert torch.allclose(ours[0][0], part[0][0], rtol=2**-20, atol=2**-16)


def test_displaced_rows_begin_where_the_whole_would() -> None:
    """Addresses lie earlier by what is not there, of an item a block by as many blocks, and counts are larger."""
    codes, scales = torch.zeros(1024, dtype=torch.uint8), torch.zeros(4)
    table = tiles.pointer_table(([codes], [scales]))
    displace(table, ([codes], [scales]), torch.tensor([2048]), (1, 256))
    assert table[0, :2].tolist() == [codes.data_ptr() - 2048, scales.data_ptr() - 32]
    assert table[0, tiles.COUNT_COLUMN] == 3072
    (found,) = tiles.split(table, torch.tensor([0]), 1024, (0,), torch.tensor([2048]))
    assert (found.first.tolist(), found.count.tolist()) == ([2], [1])
