"""How GPU kernels are launched: layouts, tables and arguments as plain data, on any machine that has Triton."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lisa_kernels.ops.tiles import (
    COUNT_COLUMN,
    ELEMENT,
    VECTOR,
    WHOLE,
    Launch,
    Shape,
    Tiles,
    pointer_table,
    split,
    tile_shape,
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")

BLOCK_SIZES = [1 << power for power in range(4, 17)]
SIZES = (1, 255, 256, 257, 2047, 2048, 2049, 4096, 4104, 70001)


def shapes() -> list[Shape]:
    return [tile_shape(block, vector, warp) for block in BLOCK_SIZES for vector in (4, 8) for warp in (32, 64)]


def elements_of(shape: Shape) -> list[int]:
    """Return the places that a program's steps touch, as the kernels compute them, sorted."""
    tile = shape.ROWS * shape.LANES * shape.VECTOR * shape.STEPS
    row, lane, place = np.ix_(range(shape.ROWS), range(shape.LANES), range(shape.VECTOR))
    offsets = row * shape.BLOCK + lane * shape.VECTOR + place
    parts = [
        offsets + step * shape.LANES * shape.VECTOR + part * tile
        for part in range(shape.PASSES)
        for step in range(shape.STEPS)
    ]
    return sorted(np.concatenate([part.ravel() for part in parts]).tolist())


@pytest.mark.parametrize("shape", shapes(), ids=lambda shape: "-".join(map(str, shape)))
def test_a_program_touches_each_of_its_elements_once(shape: Shape) -> None:
    """No element is left out or stepped twice, blocks are whole, and random words know places below 2**16 only."""
    assert elements_of(shape) == list(range(shape.elements))
    assert shape.elements % shape.BLOCK == 0
    assert shape.elements <= 1 << 16


@pytest.mark.parametrize("shape", shapes(), ids=lambda shape: "-".join(map(str, shape)))
def test_rows_of_a_program_are_its_blocks(shape: Shape) -> None:
    """All that a row touches has one absmax."""
    row = np.arange(shape.ROWS)[:, None]
    touched = row * shape.BLOCK + np.arange(shape.LANES * shape.VECTOR * shape.STEPS)
    assert (touched // shape.BLOCK == row).all()


def test_a_layout_that_leaves_elements_out_is_seen() -> None:
    """Negative control of the above."""
    shape = tile_shape(256, 8)._replace(STEPS=1)
    assert elements_of(shape) != list(range(tile_shape(256, 8).elements))


@pytest.mark.parametrize("shape", shapes(), ids=lambda shape: "-".join(map(str, shape)))
def test_rows_fill_the_memory_sectors_they_touch(shape: Shape) -> None:
    """Neighbouring lanes read 32 bytes or more of the widest tensor, as much as memory delivers at least."""
    assert shape.LANES * shape.VECTOR * (16 // shape.VECTOR) >= 32


def table_of(addresses: Sequence[int], counts: Sequence[int]) -> Tensor:
    table = torch.zeros((len(counts), COUNT_COLUMN + 1), dtype=torch.int64)
    table[:, 0], table[:, COUNT_COLUMN] = torch.tensor(addresses), torch.tensor(counts)
    return table


def covered(tiles: Sequence[Tiles], tile: int, counts: Sequence[int]) -> list[list[int]]:
    """Return for each tensor the tiles that its launches cover, sorted."""
    found: list[list[int]] = [[] for _ in counts]
    for part in tiles:
        for item in part.items().tolist():
            found[item >> 32].append(item & 0xFFFFFFFF)
    return [sorted(places) for places in found]


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_work_items_cover_each_tensor_once(aligned: bool) -> None:
    """Every tile of every tensor is in exactly one launch."""
    table = table_of([64 if aligned else 66] * len(SIZES), SIZES)
    tiles = split(table, torch.arange(len(SIZES)), 2048, (0,))
    assert covered(tiles, 2048, SIZES) == [list(range(-(-count // 2048))) for count in SIZES]


@pytest.mark.parametrize(
    ("address", "count", "expected"),
    [
        (64, 4096, {WHOLE: 2}),
        (64, 4104, {WHOLE: 2, VECTOR: 1}),
        (64, 4097, {WHOLE: 2, ELEMENT: 1}),
        (64, 8, {VECTOR: 1}),
        (64, 1, {ELEMENT: 1}),
        (66, 4096, {ELEMENT: 2}),
        (0, 0, {}),
    ],
    ids=["whole", "part", "odd part", "small", "one element", "unaligned", "empty"],
)
def test_access_follows_address_and_count(address: int, count: int, expected: dict[int, int]) -> None:
    """Wide accesses are used exactly where each lies inside its tensor and on its own boundary."""
    tiles = split(table_of([address], [count]), torch.arange(1), 2048, (0,))
    assert {part.access: part.programs for part in tiles} == expected


def test_only_tensors_with_an_item_per_element_must_be_aligned() -> None:
    """An absmax of four bytes may lie anywhere."""
    table = table_of([64], [2048])
    table[0, 3] = 68
    assert split(table, torch.arange(1), 2048, (0, 1, 2, 4))[0].access == WHOLE
    assert split(table, torch.arange(1), 2048, (0, 3))[0].access == ELEMENT


def test_places_beyond_32_bits_are_kept() -> None:
    """A tensor of 2**33 elements has tiles that begin beyond 2**31, and their items say so."""
    [tiles] = split(table_of([64, 64], [16, 1 << 33]), torch.tensor([1]), 2048, (0,))
    assert tiles.programs == 1 << 22
    last = int(tiles.items()[-1])
    assert (last >> 32, (last & 0xFFFFFFFF) * 2048) == (1, (1 << 33) - 2048)


def test_the_pointer_table_holds_addresses_and_counts() -> None:
    """Row k is tensor k of every list."""
    params, grads = [torch.zeros(5), torch.zeros(7)], [torch.zeros(5), torch.zeros(7)]
    table = pointer_table((params, grads))
    assert table.shape == (2, 8)
    assert table[:, 0].tolist() == [param.data_ptr() for param in params]
    assert table[:, 1].tolist() == [grad.data_ptr() for grad in grads]
    assert table[:, COUNT_COLUMN].tolist() == [5, 7]


def adamw8_launches(counts: Sequence[int], dtypes: Sequence[torch.dtype], block_size: int = 256) -> list[Launch]:
    from lisa_kernels.ops.adamw8.triton_kernel import adamw8_launches as launches_of

    k = len(counts)
    codes = [torch.zeros(n, dtype=torch.uint8) for n in counts]
    absmax = [torch.zeros(-(-n // block_size)) for n in counts]
    values = [torch.zeros(n, dtype=dtype) for n, dtype in zip(counts, dtypes)]
    keys, skip = torch.zeros(k, dtype=torch.int64), torch.zeros((), dtype=torch.bool)
    launches: list[Launch] = launches_of(
        values, values, codes, absmax, codes, absmax, torch.zeros((k, 8)), keys, skip, block_size, True
    )
    return launches


def summary(launches: Sequence[Launch]) -> list[tuple[str, int, int]]:
    return [(launch.kernel.fn.__name__, launch.constants["ACCESS"], launch.programs) for launch in launches]


def test_small_tensors_share_one_launch() -> None:
    """A thousand tensors of one size and dtype are stepped by one launch."""
    assert summary(adamw8_launches([1024] * 1000, [torch.float32] * 1000)) == [("adamw8_many", VECTOR, 1000)]


def test_a_large_tensor_has_a_launch_of_its_own() -> None:
    """It needs no tables; what is left over at its end joins the small ones."""
    counts = [2048 * 1024 + 8, 4096, 8]
    assert summary(adamw8_launches(counts, [torch.bfloat16] * 3)) == [
        ("adamw8_one", WHOLE, 1024), ("adamw8_many", WHOLE, 2), ("adamw8_many", VECTOR, 2),
    ]  # fmt: skip


def test_each_combination_of_dtypes_has_its_launch() -> None:
    """A kernel is compiled for one pair of dtypes."""
    launches = adamw8_launches([2048] * 4, [torch.float32, torch.bfloat16] * 2)
    names = [(launch.constants["PARAM"].name, launch.programs) for launch in launches]
    assert names == [("fp32", 2), ("bf16", 2)]


def test_all_tables_go_to_the_device_in_one_copy() -> None:
    """The tables of all launches of a step are parts of one buffer."""
    launches = adamw8_launches([2048, 2048, 8, 8, 3, 3], [torch.float32] * 6)
    tables = [launch.arguments[name] for launch in launches for name in ("table", "work")]
    assert len(launches) == 3
    assert len({table.untyped_storage().data_ptr() for table in tables if isinstance(table, Tensor)}) == 1


def test_empty_tensors_need_no_launch() -> None:
    """A parameter without elements is stepped by doing nothing."""
    assert adamw8_launches([0], [torch.float32]) == []
    assert summary(adamw8_launches([0, 2048], [torch.float32] * 2)) == [("adamw8_one", WHOLE, 1)]


def test_gradients_are_measured_by_dtype() -> None:
    """Each launch writes one pair of results per program into buffers of its own."""
    from lisa_kernels.ops.grad_norm.triton_kernel import combine, grad_norm_launches

    grads = [torch.ones(8192), torch.ones(4096, dtype=torch.bfloat16), torch.ones(8)]
    launches = grad_norm_launches(grads, squares=True)
    assert [launch.programs for launch in launches] == [2, 1, 1]
    for launch in launches:
        for name in ("largest", "squares"):
            results = launch.arguments[name]
            assert isinstance(results, Tensor)
            results.fill_(3.0)
    assert combine(launches, torch.device("cpu")).tolist() == [3.0, 3.0 * 4]


def specialised(kernel: Any) -> list[str]:
    """Return the run-time arguments whose values or addresses would make Triton compile a kernel again."""
    found = []
    for parameter in kernel.params:
        if parameter.is_constexpr:
            continue
        by_value = parameter.annotation_type == "i64" and not parameter.do_not_specialize
        by_address = not parameter.annotation_type and not parameter.do_not_specialize_on_alignment
        if by_value or by_address:
            found.append(parameter.name)
    return found


def every_kernel() -> list[Any]:
    from lisa_kernels.ops.adamw8.triton_kernel import adamw8_many, adamw8_one, adamw32_many
    from lisa_kernels.ops.blockwise8.triton_kernel import dequantize_kernel, quantize_kernel
    from lisa_kernels.ops.fold.triton_kernel import fold_tile
    from lisa_kernels.ops.grad_norm.triton_kernel import grad_norm_many
    from lisa_kernels.ops.project.triton_kernel import project_tile

    moments = [adamw8_many, adamw8_one, adamw32_many, dequantize_kernel, quantize_kernel]
    return [*moments, fold_tile, grad_norm_many, project_tile]


def test_new_values_never_recompile() -> None:
    """Neither a size, a row, a tile nor an address is part of what a kernel is compiled for."""
    assert [specialised(kernel) for kernel in every_kernel()] == [[]] * 8


def test_a_kernel_that_would_recompile_is_seen() -> None:
    """Negative control: Triton's default."""
    kernel = importlib.import_module("triton").jit(every_kernel()[1].fn)
    assert {"count", "row", "first_tile", "param", "skip"} <= set(specialised(kernel))


def test_launches_name_every_argument() -> None:
    """The arguments and constants of a launch are those of its kernel, no more and no fewer."""
    for launch in adamw8_launches([2048 * 1024 + 3, 5, 7], [torch.float32] * 3):
        assert sorted([*launch.arguments, *launch.constants]) == sorted(launch.kernel.arg_names)
