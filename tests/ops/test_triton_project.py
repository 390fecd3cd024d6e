"""The compiled projection is P Gᵀ within its stated bound, and exactly where its sums are exact."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ptx import PtxError
from tolerances import product_of_parts
from torch import Tensor

from lisa_kernels.ops.tiles import ELEMENT, VECTOR

from .kernel_checks import BF16, FP16, FP32, assert_equal_bits
from .kernel_runs import Machine, Poisoned, edited_kernels

kernels = importlib.import_module("lisa_kernels.ops.project.triton_kernel")

# Hopper's matrix units are not emulated: its code is only compiled.
SEEN = [Machine(80), *([Machine(None)] if torch.cuda.is_available() else [])]
# sm_89 has the code of sm_86 (tests/test_kernel_code.py).
OTHERS = [Machine(86), Machine(120)]
DTYPES = {
    "bfloat16": (BF16, BF16), "float16": (FP16, FP16), "float32": (FP32, FP32), "mixed": (BF16, FP32),
    "mixed halves": (FP16, FP32),
}  # fmt: skip
REST = ("float16", "float32", "mixed halves")


def whole(bits: int, *shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Return random whole numbers of so many bits and a sign, over 2⁸."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(1 - (1 << bits), 1 << bits, shape, generator=generator) / 256).to(dtype)


def exact(rank: int, m: int, n: int, kind: str = "bfloat16", transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Return a basis and a gradient whose products and sums are exact in float32."""
    basis, gradient = DTYPES[kind]
    # With the bits of a sum of `n` products these are at most 24.
    bits = (2, 12) if gradient == FP32 else (6, 6)
    first = whole(bits[0], rank, n, seed=1, dtype=basis)
    shape = (n, m) if transposed else (m, n)
    second = whole(bits[1], *shape, seed=2, dtype=gradient)
    return first, second.t() if transposed else second


def run(machine: Machine, basis: Tensor, gradient: Tensor, tile: object = None, shift: int = 0) -> Tensor:
    """Project on a machine."""
    memory, stored = Poisoned(machine.device, shift), gradient if gradient.is_contiguous() else gradient.t()
    flat = memory.place([basis, stored])
    there, given = flat[0].view(basis.shape), flat[1].view(stored.shape)
    given = given if gradient.is_contiguous() else given.t()
    launch = machine.module("project").project_launch(there, given, machine.warp, tile)
    sums = memory.empty(launch.arguments["sums"]).view(launch.arguments["sums"].shape)
    machine.run([replace(launch, arguments={**launch.arguments, "sums": sums})])
    memory.assert_untouched()
    assert_equal_bits(there.flatten(), basis.flatten(), "values of the basis, which is only read,")
    return sums.sum(dim=0).cpu()


def check_exact(machine: Machine, basis: Tensor, gradient: Tensor, tile: object = None, shift: int = 0) -> None:
    """Project without rounding anywhere: bit for bit."""
    ours = run(machine, basis, gradient, tile, shift)
    assert_equal_bits(ours.flatten(), (basis.double() @ gradient.double().t()).float().flatten(), "results")


def check_bound(machine: Machine, basis: Tensor, gradient: Tensor) -> None:
    """Project any numbers: each result errs by no more than the kernel says."""
    ours, (first, second) = run(machine, basis, gradient), (basis.double(), gradient.double())
    share = product_of_parts(basis.dtype, gradient.dtype, gradient.shape[1])
    bound = share * (first.abs() @ second.abs().t())
    assert bool(((ours.double() - first @ second.t()).abs() <= bound).all())


@pytest.mark.parametrize("machine", SEEN, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["dense", "transposed"])
@pytest.mark.parametrize("kind", ["bfloat16", "mixed", *(pytest.param(kind, marks=pytest.mark.slow) for kind in REST)])
def test_exact_sums_are_exact(machine: Machine, kind: str, transposed: bool) -> None:
    """Tiles that end inside rank, rows and columns."""
    check_exact(machine, *exact(24, 72, 72, kind, transposed))


@pytest.mark.parametrize("machine", OTHERS, ids=str)
@pytest.mark.parametrize("kind", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_other_capabilities_are_exact(machine: Machine, kind: str) -> None:
    check_exact(machine, *exact(16, 72, 136, kind))


@pytest.mark.parametrize("machine", SEEN, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["dense", "transposed"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 33, 65)], ids=str)
def test_odd_sizes_are_projected_element_by_element(
    machine: Machine, shape: tuple[int, int, int], transposed: bool
) -> None:
    check_exact(machine, *exact(*shape, "bfloat16", transposed))


@pytest.mark.parametrize("machine", SEEN, ids=str)
def test_views_that_begin_anywhere_are_projected(machine: Machine) -> None:
    check_exact(machine, *exact(4, 40, 72), shift=1)


@pytest.mark.parametrize("machine", SEEN, ids=str)
def test_parts_of_the_columns_are_added(machine: Machine) -> None:
    """Few rows and a small rank: many programs share a row of the result."""
    basis, gradient = exact(4, 64, 1032)
    assert kernels.parts_of(4, 64, 1032, kernels.tile_of(4, BF16, BF16, False))[0] > 4
    check_exact(machine, basis, gradient)


@pytest.mark.parametrize("machine", SEEN, ids=str)
@pytest.mark.parametrize("kind", ["bfloat16", "mixed", *(pytest.param(kind, marks=pytest.mark.slow) for kind in REST)])
def test_any_numbers_stay_within_the_stated_bound(machine: Machine, kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    basis, gradient = (torch.randn(k, 264, generator=generator).to(d) for k, d in zip((16, 64), DTYPES[kind]))
    check_bound(machine, basis, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [*SEEN, *OTHERS], ids=str)
@pytest.mark.parametrize("rank", [4, 200])
@pytest.mark.parametrize("kind", DTYPES)
def test_every_rank_on_every_capability(machine: Machine, kind: str, rank: int) -> None:
    """Less than the smallest tile, and more than the largest, which ends in the middle of its last one."""
    for transposed in (False, True):
        check_exact(machine, *exact(rank, 72, 72, kind, transposed))
    check_exact(machine, *exact(rank, 65, 67, kind))


@pytest.mark.slow
@pytest.mark.parametrize("machine", SEEN, ids=str)
@pytest.mark.parametrize("rank", [128, 1024])
def test_ranks_of_whole_tiles_run_the_same_code(machine: Machine, rank: int) -> None:
    """The largest tile alone and eight of them; only the grid and masks that are never false differ from rank 200."""
    tiles = {kernels.tile_of(number, BF16, BF16, False) for number in (rank, 200)}
    assert len(tiles) == 1
    check_exact(machine, *exact(rank, 72, 72))


@pytest.mark.parametrize("tile", [(16, 16, 16, 32), (64, 32, 32, 128), (32, 128, 64, 256)], ids=str)
def test_results_do_not_depend_on_the_tile(tile: tuple[int, ...]) -> None:
    check_exact(SEEN[0], *exact(40, 72, 136), kernels.ProjectTile(*tile))


@pytest.mark.parametrize(
    ("rank", "rows", "columns"), [(4, 64, 4096), (128, 4096, 4096), (128, 4096, 11008), (1024, 4096, 4096), (16, 8, 8)]
)
def test_the_columns_are_divided_without_a_rest(rank: int, rows: int, columns: int) -> None:
    """Parts cover the columns, none is empty, and writing and reading sums costs a byte per element of G at most."""
    tile = kernels.tile_of(rank, BF16, BF16, False)
    parts, span = kernels.parts_of(rank, rows, columns, tile)
    assert (parts - 1) * span < columns <= parts * span
    assert span % tile.K == 0
    assert parts == 1 or 8 * rank <= span


@pytest.mark.parametrize(
    ("m", "n", "shift", "access"),
    [(64, 64, 0, VECTOR), (64, 60, 0, ELEMENT), (60, 64, 0, ELEMENT), (64, 64, 1, ELEMENT)],
    ids=["whole vectors", "odd columns", "odd rows", "unaligned"],
)
def test_access_follows_addresses_and_sizes(m: int, n: int, shift: int, access: int) -> None:
    gradient = torch.zeros(m * n + shift, dtype=BF16)[shift:].view(m, n)
    assert kernels.project_launch(torch.zeros(4, n, dtype=BF16), gradient).constants["ACCESS"] == access


# What stands in the kernel's source once, what is put there, and a problem that must show it.
SMALL, PARTED, MIXED = exact(12, 72, 136), exact(4, 64, 1032), exact(16, 40, 72, "mixed")
DEFECTS = {
    "inclusive end of columns": ("project", "along < left - begin", "along <= left - begin", PARTED),
    "inclusive end of rows": ("project", "down < rows", "down <= rows", SMALL),
    "inclusive end of the rank": ("project", "across < (rank - first)", "across <= (rank - first)", SMALL),
    "steps overlap": ("project", "advance(basis, K, ACCESS)", "advance(basis, K // 2, ACCESS)", SMALL),
    "parts overlap": ("project", "tl.minimum(span, columns - start)", "(columns - start)", PARTED),
    "parts in one place": ("project", "(part * rank + first)", "first", PARTED),
    "no low part": (
        "tiles", "tl.dot(left, high, tl.dot(left, low, total))", "tl.dot(left, high, total)", MIXED,
    ),
}  # fmt: skip
FAST = {"inclusive end of columns", "no low part"}


@pytest.mark.parametrize(
    "defect", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in DEFECTS]
)
def test_a_defect_is_seen(defect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new, problem = DEFECTS[defect]
    machine = replace(edited_kernels(module, old, new, tmp_path, monkeypatch), sm=80)
    fails(lambda: check_exact(machine, *problem))


def test_a_factor_rounded_to_bfloat16_breaks_the_bound() -> None:
    """Negative control of the bound."""
    generator = torch.Generator().manual_seed(3)
    basis, gradient = torch.randn(16, 264, generator=generator).bfloat16(), torch.randn(64, 264, generator=generator)
    ours = run(SEEN[0], basis, gradient.bfloat16())
    error = (ours.double() - basis.double() @ gradient.double().t()).abs()
    bound = product_of_parts(BF16, FP32, 264) * (basis.double().abs() @ gradient.double().abs().t())
    assert bool((error > bound).any())


def fails(check: Callable[[], object]) -> None:
    """Require that a check fails, by what it finds or by a fault."""
    with pytest.raises((AssertionError, PtxError)):
        check()
