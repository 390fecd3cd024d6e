"""One AdamW step in Triton on 8-bit or 32-bit moments: one pass over the elements, and one launch for many tensors.

    m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²        w ← decay · w − step_size · m / (√v + ε')

Both moments are worked on divided by 1 − β, as the reference's `Scalars` say. They and their codes equal the
reference's bit for bit. The weight's update uses the GPU's approximate root and reciprocal root: it errs by less than
2⁻²⁰ of itself. Everything that changes from step to step is read from device memory, so nothing is ever compiled twice
and a captured CUDA graph stays valid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lisa_kernels.ops.blockwise8.triton_kernel import (
    HALF,
    INVERSE_TOP,
    TOP,
    block_absmax,
    encode_m,
    encode_v,
    load_absmax,
    load_m,
    load_v,
    reciprocal,
    store_absmax,
)
from lisa_kernels.ops.tiles import (
    WARP,
    Launch,
    TableGroup,
    pointer_table,
    rows_by_dtypes,
    split,
    table_launches,
    tile_shape,
    to_device,
    vector_of,
    warp_size,
)
from lisa_kernels.ops.tiles.parts import cut_at_tiles, displace
from lisa_kernels.ops.tiles.triton_kernel import (
    TRITON_DTYPES,
    advance,
    element_offsets,
    element_pointers,
    load_floats,
    m_bits,
    random_state,
    random_words,
    store,
    store_floats,
    tile_mask,
    tile_offsets,
    v_bits,
    weight_bits,
    work_item,
)

# Programs from which on a tensor is worth a launch of its own, without tables.
LARGE = 1024
# Elements of a program on 32-bit moments.
ELEMENTS_32 = 2048


@triton.jit
def new_moments(
    grad, m_codes, v_codes, offsets, SHIFT: tl.constexpr, left, m_scale, v_scale, grad_scale,
    VECTOR: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """The new moments of one step of a tile, divided by 1 − β; zeros where it ends."""
    mask = tile_mask(offsets, SHIFT, left, VECTOR, ACCESS)
    g = load_floats(grad, offsets, SHIFT, mask, VECTOR, ACCESS) * grad_scale
    m = tl.fma(load_m(m_codes, offsets, SHIFT, mask, VECTOR, ACCESS), tl.broadcast_to(m_scale, g.shape), g)
    v = tl.fma(g, g, load_v(v_codes, offsets, SHIFT, mask, v_scale, VECTOR, ACCESS))
    return m, v


@triton.jit
def new_weight(weight, m, v, eps, decay, step_size):
    """The new float32 weight: decay first; m / (√v + ε') as m times the squared reciprocal root of the divisor."""
    # The approximate root of a subnormal v is 0, and ε' never.
    root = tl.rsqrt(tl.sqrt(v) + eps)
    return tl.fma(-((m * root) * root), step_size, weight * decay)


@triton.jit
def write_step(
    param, m_codes, v_codes, offsets, SHIFT: tl.constexpr, left, m, v, m_scale, v_scale, eps, decay, step_size, state,
    first_element, STOCHASTIC: tl.constexpr, VECTOR: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """Encode the moments of one step of a tile, update its weights and store all three."""
    mask = tile_mask(offsets, SHIFT, left, VECTOR, ACCESS)
    weight = load_floats(param, offsets, SHIFT, mask, VECTOR, ACCESS)
    m_random = tl.full([1, 1, 1], HALF, tl.uint32)
    v_random, weight_random = m_random, m_random
    if STOCHASTIC:
        words = random_words(state, element_offsets(offsets, SHIFT, VECTOR) + first_element)
        m_random, v_random, weight_random = m_bits(words), v_bits(words), weight_bits(words)
    weight = new_weight(weight, m, v, eps, decay, step_size)
    store(element_pointers(m_codes, offsets, SHIFT, VECTOR), encode_m(m, m_scale, m_random), mask, ACCESS)
    store(element_pointers(v_codes, offsets, SHIFT, VECTOR), encode_v(v, v_scale * 2, v_random), mask, ACCESS)
    pointers = element_pointers(param, offsets, SHIFT, VECTOR)
    store_floats(pointers, weight, weight_random, mask, STOCHASTIC, ACCESS)


@triton.jit
def update_tile(
    param, grad, m_codes, m_absmax, v_codes, v_absmax, left, start, scalars, key,
    STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Step a tile of whole blocks, whose moments stay in registers; `scalars` and `key` are its tensor's."""
    offsets = tile_offsets(ROWS, LANES, VECTOR, BLOCK)
    grad_scale = tl.load(scalars + 7)
    m_scale = load_absmax(m_absmax, left, ROWS, BLOCK, ACCESS) * INVERSE_TOP * tl.load(scalars)
    v_scale = load_absmax(v_absmax, left, ROWS, BLOCK, ACCESS) * INVERSE_TOP * tl.load(scalars + 2)
    ms, vs = (), ()
    for step in tl.static_range(STEPS):
        m, v = new_moments(
            grad, m_codes, v_codes, offsets, step * LANES * VECTOR, left, m_scale, v_scale, grad_scale, VECTOR, ACCESS
        )
        ms, vs = ms + (m,), vs + (v,)  # noqa: RUF005 - Triton has no starred tuples
    m_largest, v_largest = tl.abs(ms[0]), vs[0]
    for step in tl.static_range(1, STEPS):
        m_largest, v_largest = tl.maximum(m_largest, tl.abs(ms[step])), tl.maximum(v_largest, vs[step])
    m_largest, v_largest = block_absmax(m_largest), block_absmax(v_largest)
    store_absmax(m_absmax, m_largest * tl.load(scalars + 1), left, LANES, VECTOR, BLOCK, ACCESS)
    store_absmax(v_absmax, v_largest * tl.load(scalars + 3), left, LANES, VECTOR, BLOCK, ACCESS)
    m_scale, v_scale = reciprocal(m_largest) * TOP, reciprocal(v_largest) * TOP
    eps, decay, step_size = tl.load(scalars + 4), tl.load(scalars + 5), tl.load(scalars + 6)
    state = random_state(tl.load(key), start)
    # The weight is loaded late: two registers per element are all that is held over the search for the largest.
    for step in tl.static_range(STEPS):
        write_step(
            param, m_codes, v_codes, offsets, step * LANES * VECTOR, left, ms[step], vs[step], m_scale, v_scale,
            eps, decay, step_size, state, 0, STOCHASTIC, VECTOR, ACCESS,
        )  # fmt: skip


@triton.jit
def update_large_block(
    param, grad, m_codes, m_absmax, v_codes, v_absmax, left, start, scalars, key,
    STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    STEPS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Step a block that is larger than a tile: a first pass finds the largest moments, a second computes them again."""
    TILE: tl.constexpr = LANES * VECTOR * STEPS
    offsets = tile_offsets(1, LANES, VECTOR, BLOCK)
    grad_scale = tl.load(scalars + 7)
    eps, decay, step_size = tl.load(scalars + 4), tl.load(scalars + 5), tl.load(scalars + 6)
    old_m_scale = load_absmax(m_absmax, left, 1, BLOCK, ACCESS) * INVERSE_TOP * tl.load(scalars)
    old_v_scale = load_absmax(v_absmax, left, 1, BLOCK, ACCESS) * INVERSE_TOP * tl.load(scalars + 2)
    m_largest = tl.zeros([1, LANES, VECTOR], tl.float32)
    v_largest = m_largest
    for part in range(PASSES):
        for step in tl.static_range(STEPS):
            m, v = new_moments(
                grad + part * TILE, m_codes + part * TILE, v_codes + part * TILE, offsets, step * LANES * VECTOR,
                left - part * TILE, old_m_scale, old_v_scale, grad_scale, VECTOR, ACCESS,
            )  # fmt: skip
            m_largest, v_largest = tl.maximum(m_largest, tl.abs(m)), tl.maximum(v_largest, v)
    m_largest, v_largest = block_absmax(m_largest), block_absmax(v_largest)
    store_absmax(m_absmax, m_largest * tl.load(scalars + 1), left, LANES, VECTOR, BLOCK, ACCESS)
    store_absmax(v_absmax, v_largest * tl.load(scalars + 3), left, LANES, VECTOR, BLOCK, ACCESS)
    m_scale, v_scale = reciprocal(m_largest) * TOP, reciprocal(v_largest) * TOP
    state = random_state(tl.load(key), start)
    for part in range(PASSES):
        for step in tl.static_range(STEPS):
            m, v = new_moments(
                grad + part * TILE, m_codes + part * TILE, v_codes + part * TILE, offsets, step * LANES * VECTOR,
                left - part * TILE, old_m_scale, old_v_scale, grad_scale, VECTOR, ACCESS,
            )  # fmt: skip
            write_step(
                param + part * TILE, m_codes + part * TILE, v_codes + part * TILE, offsets, step * LANES * VECTOR,
                left - part * TILE, m, v, m_scale, v_scale, eps, decay, step_size, state, part * TILE, STOCHASTIC,
                VECTOR, ACCESS,
            )  # fmt: skip


@triton.jit
def update8(
    param, grad, m_codes, m_absmax, v_codes, v_absmax, count, tile, scalars, key,
    STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, STEPS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Step one program's elements of a tensor; `scalars` and `key` point to the tensor's own."""
    ELEMENTS: tl.constexpr = ROWS * LANES * VECTOR * STEPS * PASSES
    start = tile * ELEMENTS
    left = tl.minimum(count - start, ELEMENTS).to(tl.int32)
    param, grad = advance(param, start, ACCESS), advance(grad, start, ACCESS)
    m_codes, v_codes = advance(m_codes, start, ACCESS), advance(v_codes, start, ACCESS)
    m_absmax, v_absmax = m_absmax + start // BLOCK, v_absmax + start // BLOCK
    if PASSES == 1:
        update_tile(
            param, grad, m_codes, m_absmax, v_codes, v_absmax, left, start, scalars, key, STOCHASTIC, ACCESS, BLOCK,
            ROWS, LANES, VECTOR, STEPS,
        )  # fmt: skip
    else:
        update_large_block(
            param, grad, m_codes, m_absmax, v_codes, v_absmax, left, start, scalars, key, STOCHASTIC, ACCESS, BLOCK,
            LANES, VECTOR, STEPS, PASSES,
        )  # fmt: skip


_TENSORS = ["param", "grad", "m_codes", "m_absmax", "v_codes", "v_absmax"]
# Places in the above of the tensors with an item per element.
WIDE = (0, 1, 2, 4)
_COMMON = ["scalars", "keys", "skip"]


@triton.jit(
    do_not_specialize=["count", "row", "first_tile"], do_not_specialize_on_alignment=[*_TENSORS, *_COMMON]
)  # fmt: skip
def adamw8_one(
    param, grad, m_codes, m_absmax, v_codes, v_absmax, scalars, keys, skip, count: tl.int64, row: tl.int64,
    first_tile: tl.int64,
    STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, STEPS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Step one tensor, the one of row `row` of the scalars and keys, from its tile `first_tile` on."""
    if tl.load(skip) != 0:
        return
    update8(
        param, grad, m_codes, m_absmax, v_codes, v_absmax, count, first_tile + tl.program_id(0), scalars + 8 * row,
        keys + row, STOCHASTIC, ACCESS, BLOCK, ROWS, LANES, VECTOR, STEPS, PASSES,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["table", "work", *_COMMON])
def adamw8_many(
    table, work, scalars, keys, skip, PARAM: tl.constexpr, GRAD: tl.constexpr,
    STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, STEPS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Step the tiles that `work` lists of the tensors of `table` (`lisa_kernels.ops.launches`)."""
    if tl.load(skip) != 0:
        return
    row, tile = work_item(work)
    entry = table + row * 8
    update8(
        tl.load(entry).to(tl.pointer_type(PARAM)), tl.load(entry + 1).to(tl.pointer_type(GRAD)),
        tl.load(entry + 2).to(tl.pointer_type(tl.uint8)), tl.load(entry + 3).to(tl.pointer_type(tl.float32)),
        tl.load(entry + 4).to(tl.pointer_type(tl.uint8)), tl.load(entry + 5).to(tl.pointer_type(tl.float32)),
        tl.load(entry + 7), tile, scalars + 8 * row, keys + row,
        STOCHASTIC, ACCESS, BLOCK, ROWS, LANES, VECTOR, STEPS, PASSES,
    )  # fmt: skip


@triton.jit
def update_step32(
    param, grad, m_pointer, v_pointer, offsets, SHIFT: tl.constexpr, left, scalars, state, STOCHASTIC: tl.constexpr,
    VECTOR: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """Step one step of a tile on float32 moments."""
    mask = tile_mask(offsets, SHIFT, left, VECTOR, ACCESS)
    carry1, one_minus_beta1, grad_scale = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 7)
    carry2, one_minus_beta2 = tl.load(scalars + 2), tl.load(scalars + 3)
    eps, decay, step_size = tl.load(scalars + 4), tl.load(scalars + 5), tl.load(scalars + 6)
    g = load_floats(grad, offsets, SHIFT, mask, VECTOR, ACCESS) * grad_scale
    m = tl.fma(load_floats(m_pointer, offsets, SHIFT, mask, VECTOR, ACCESS), carry1, g)
    v = tl.fma(g, g, load_floats(v_pointer, offsets, SHIFT, mask, VECTOR, ACCESS) * carry2)
    weight = load_floats(param, offsets, SHIFT, mask, VECTOR, ACCESS)
    weight = new_weight(weight, m, v, eps, decay, step_size)
    words = random_words(state, element_offsets(offsets, SHIFT, VECTOR))
    store(element_pointers(m_pointer, offsets, SHIFT, VECTOR), m * one_minus_beta1, mask, ACCESS)
    store(element_pointers(v_pointer, offsets, SHIFT, VECTOR), v * one_minus_beta2, mask, ACCESS)
    pointers = element_pointers(param, offsets, SHIFT, VECTOR)
    store_floats(pointers, weight, weight_bits(words), mask, STOCHASTIC, ACCESS)


@triton.jit(do_not_specialize_on_alignment=["table", "work", *_COMMON])
def adamw32_many(
    table, work, scalars, keys, skip, PARAM: tl.constexpr, GRAD: tl.constexpr,
    STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, STEPS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Step the tiles that `work` lists of tensors whose moments are float32; their blocks mean nothing here."""
    if tl.load(skip) != 0:
        return
    row, tile = work_item(work)
    entry, scalars = table + row * 8, scalars + 8 * row
    start = tile * BLOCK
    left = tl.minimum(tl.load(entry + 7) - start, BLOCK).to(tl.int32)
    param = advance(tl.load(entry).to(tl.pointer_type(PARAM)), start, ACCESS)
    grad = advance(tl.load(entry + 1).to(tl.pointer_type(GRAD)), start, ACCESS)
    m = advance(tl.load(entry + 2).to(tl.pointer_type(tl.float32)), start, ACCESS)
    v = advance(tl.load(entry + 3).to(tl.pointer_type(tl.float32)), start, ACCESS)
    state = random_state(tl.load(keys + row), start)
    offsets = tile_offsets(ROWS, LANES, VECTOR, BLOCK)
    for step in tl.static_range(STEPS):
        update_step32(
            param, grad, m, v, offsets, step * LANES * VECTOR, left, scalars, state, STOCHASTIC, VECTOR, ACCESS
        )


def _elements(block_size: int) -> tuple[int, ...]:
    """Return how many elements there are to an item of each list of tensors."""
    return 1, 1, 1, block_size, 1, block_size


def _displaced(
    table: Tensor, lists: Sequence[Sequence[Tensor]], starts: Sequence[int] | None, elements: Sequence[int]
) -> Tensor | None:  # fmt: skip
    return None if starts is None else displace(table, lists, torch.tensor(starts, device="cpu"), elements)


def adamw8_launches(
    params: Sequence[Tensor], grads: Sequence[Tensor], m_codes: Sequence[Tensor], m_absmax: Sequence[Tensor],
    v_codes: Sequence[Tensor], v_absmax: Sequence[Tensor], scalars: Tensor, keys: Tensor, skip: Tensor,
    block_size: int, stochastic: bool, warp: int = WARP, starts: Sequence[int] | None = None,
) -> list[Launch]:  # fmt: skip
    """Return the launches of one step: one per dtypes and access for all small tensors, one for each large one."""
    lists = (params, grads, m_codes, m_absmax, v_codes, v_absmax)
    common = {"scalars": scalars, "keys": keys, "skip": skip.view(torch.uint8)}
    table = pointer_table(lists)
    later = _displaced(table, lists, starts, _elements(block_size))
    launches, shared = [], []
    for (param, grad), rows in rows_by_dtypes((params, grads)).items():
        shape = tile_shape(block_size, vector_of(param), warp)
        for tiles in split(table, rows, shape.elements, WIDE, later):
            constants = {"STOCHASTIC": stochastic, "ACCESS": tiles.access, **shape.constants()}
            large, small = tiles.large(LARGE) if later is None else ([], tiles)
            for row, first, count in large:
                tensors = {name: tensors[row] for name, tensors in zip(_TENSORS, lists)}
                own = {"count": params[row].numel(), "row": row, "first_tile": first}
                launches.append(Launch(adamw8_one, {**tensors, **common, **own}, constants, count, shape.num_warps))
            if small is not None:
                dtypes = {"PARAM": TRITON_DTYPES[param], "GRAD": TRITON_DTYPES[grad]}
                shared.append(TableGroup(adamw8_many, small, {**dtypes, **constants}, shape.num_warps))
    return launches + table_launches(table, shared, common, params[0].device)


def adamw32_launches(
    params: Sequence[Tensor], grads: Sequence[Tensor], m: Sequence[Tensor], v: Sequence[Tensor], scalars: Tensor,
    keys: Tensor, skip: Tensor, stochastic: bool, warp: int = WARP, starts: Sequence[int] | None = None,
) -> list[Launch]:  # fmt: skip
    """Return the launches of one step, one per dtypes and access; starts: as above."""
    common = {"scalars": scalars, "keys": keys, "skip": skip.view(torch.uint8)}
    table = pointer_table((params, grads, m, v))
    later = _displaced(table, (params, grads, m, v), starts, (1, 1, 1, 1))
    # Vectors of four: an access of 16 bytes of the widest tensors, the moments.
    shape = tile_shape(ELEMENTS_32, vector_of(torch.float32), warp)
    shared = []
    for (param, grad), rows in rows_by_dtypes((params, grads)).items():
        dtypes = {"PARAM": TRITON_DTYPES[param], "GRAD": TRITON_DTYPES[grad]}
        for tiles in split(table, rows, shape.elements, (0, 1, 2, 3), later):
            constants = {**dtypes, "STOCHASTIC": stochastic, "ACCESS": tiles.access, **shape.constants()}
            shared.append(TableGroup(adamw32_many, tiles, constants, shape.num_warps))
    return table_launches(table, shared, common, params[0].device)


def _take_step(
    launches_of: Callable[..., list[Launch]], lists: Sequence[list[Tensor]], scalars: Tensor, keys: Tensor,
    skip: Tensor, options: Sequence[Any], starts: list[int] | None, tile: int, elements: Sequence[int],
) -> None:  # fmt: skip
    """Run the launches of a step; parts of larger tensors are cut where they begin within a tile of the whole."""
    warp = warp_size(keys.device)
    if starts is None:
        for launch in launches_of(*lists, scalars, keys, skip, *options, warp):
            launch.run()
        return
    parts = cut_at_tiles(lists, starts, tile, elements)
    if not parts.rows:
        return
    rows = to_device(torch.tensor(parts.rows, dtype=torch.int64, device="cpu"), keys.device)
    inputs = scalars.index_select(0, rows), keys.index_select(0, rows), skip
    for launch in launches_of(*parts.lists, *inputs, *options, warp, parts.starts):
        launch.run()
    parts.write_back()


def adamw8_(
    params: list[Tensor], grads: list[Tensor], m_codes: list[Tensor], m_absmax: list[Tensor], v_codes: list[Tensor],
    v_absmax: list[Tensor], scalars: Tensor, keys: Tensor, skip: Tensor, block_size: int, stochastic: bool,
    starts: list[int] | None = None,
) -> None:  # fmt: skip
    """Update parameters and their 8-bit moments in place on a GPU; the contract is the package's."""
    if params:
        lists, options = (params, grads, m_codes, m_absmax, v_codes, v_absmax), (block_size, stochastic)
        # As many elements with vectors of any dtype.
        tile = tile_shape(block_size, vector_of(torch.float32)).elements
        _take_step(adamw8_launches, lists, scalars, keys, skip, options, starts, tile, _elements(block_size))


def adamw32_(
    params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor], scalars: Tensor, keys: Tensor,
    skip: Tensor, stochastic: bool, starts: list[int] | None = None,
) -> None:  # fmt: skip
    """Update parameters and their float32 moments in place on a GPU; the contract is the package's."""
    if params:
        lists = (params, grads, m, v)
        _take_step(adamw32_launches, lists, scalars, keys, skip, (stochastic,), starts, ELEMENTS_32, (1, 1, 1, 1))
