"""The compiled fold gives the definition's bits where sums are exact, and stays within its stated bound elsewhere."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from ptx import Program, PtxError
from tolerances import product_of_parts
from torch import Tensor

from lisa_kernels.ops.fold import master_weight, reference
from lisa_kernels.ops.random_bits import STOCHASTIC_ROUNDINGS, random_key, random_words, round_to_bfloat16, weight_bits
from lisa_kernels.ops.tiles import ELEMENT, VECTOR

from .kernel_checks import BF16, FP16, FP32, assert_equal_bits
from .kernel_runs import Machine, Poisoned, Recipe, edited_kernels, kernel_code, program_of

fold = importlib.import_module("lisa_kernels.ops.fold.triton_kernel")

# Hopper's matrix units are not emulated: its code is only compiled.
SEEN = [Machine(80), *([Machine(None)] if torch.cuda.is_available() else [])]
# sm_89 has the code of sm_86 (tests/test_kernel_code.py).
OTHERS = [Machine(86), Machine(120)]
LARGE = ((128, 32, 16, 128), (64, 256, 64, 256))
CLOCK, SEED, PARAMETER = torch.tensor(7), 3, 11
# Slot and basis of a Linear, basis and slot of a Conv1D, and all in float32 or float16.
DTYPES = {
    "bfloat16": (BF16, FP32, BF16), "bfloat16 transposed": (BF16, BF16, FP32), "float16": (FP16, FP32, FP16),
    "float32": (FP32, FP32, FP32),
}  # fmt: skip
REST = ("bfloat16 transposed", "float16", "float32")


@dataclass(frozen=True)
class Problem:
    """A fold; `lower`: of a weight with a remainder."""

    weight: Tensor
    left: Tensor
    right: Tensor
    lower: Tensor | None = None
    decay: float = 0.999
    stochastic: bool = True

    def expected(self) -> list[Tensor]:
        """Return what the definition makes of the weight, and of the remainder."""
        folded = [tensor.clone() for tensor in (self.weight, self.lower) if tensor is not None]
        rest = folded[1] if len(folded) > 1 else None
        key = random_key(SEED, PARAMETER, CLOCK) if self.stochastic else None
        given = (self.left, self.right, torch.tensor(self.decay), key)
        reference.fold_(folded[0], *given, rest)
        return folded


def whole(bits: int, *shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Return random whole numbers of so many bits and a sign, over 2⁸."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(1 - (1 << bits), 1 << bits, shape, generator=generator) / 256).to(dtype)


def exact(m: int, n: int, rank: int, kind: str = "bfloat16", remainder: bool = False) -> Problem:
    """Return a problem whose products and sums are exact in float32, though not in one bfloat16 part of the slot."""
    weight, left, right = DTYPES[kind]
    # With the bits of a sum of `rank` products these are at most 24.
    bits = {(FP32, FP32): (18, 1), (FP32, BF16): (12, 4), (BF16, FP32): (4, 12), (FP32, FP16): (11, 5)}[left, right]
    slot, basis = (whole(b, rank, k, seed=b, dtype=d) for b, k, d in zip(bits, (m, n), (left, right)))
    drawn = torch.randn(m, n, generator=torch.Generator().manual_seed(1))
    lower = torch.randint(-(2**15), 2**15, (m, n), generator=torch.Generator().manual_seed(2)).to(torch.int16)
    return Problem(drawn.to(weight), slot, basis, lower if remainder else None)


def inexact(m: int, n: int, rank: int, kind: str = "bfloat16", remainder: bool = False) -> Problem:
    """Return a problem of normal numbers, the update a tenth of the weight."""
    generator = torch.Generator().manual_seed(5)
    given = exact(m, n, rank, kind, remainder)
    left, right = (torch.randn(t.shape, generator=generator) for t in (given.left, given.right))
    return replace(
        given, left=(left * 0.1 / rank**0.5).to(given.left.dtype), right=right.to(given.right.dtype)
    )  # fmt: skip


def run(machine: Machine, problem: Problem, tile: object = None, shift: int = 0) -> list[Tensor]:
    """Fold on a machine; returns the weight and the remainder, after a look at what must not have changed."""
    memory, kernels = Poisoned(machine.device, shift), machine.module("fold")
    given = [t for t in (problem.weight, problem.left, problem.right, problem.lower) if t is not None]
    weight, left, right, *rest = (there.view(t.shape) for there, t in zip(memory.place(given), given))
    decay, key = torch.tensor(problem.decay), random_key(SEED, PARAMETER, CLOCK)
    there = decay.to(machine.device), key.to(machine.device)
    lower = rest[0] if rest else None
    launch = kernels.fold_launch(weight, left, right, *there, lower, problem.stochastic, machine.warp, tile)
    machine.run([launch])
    memory.assert_untouched()
    assert_equal_bits(left.flatten(), problem.left.flatten(), "values of the left factor, which is only read,")
    assert_equal_bits(right.flatten(), problem.right.flatten(), "values of the right factor, which is only read,")
    return [weight.cpu(), *(t.cpu() for t in rest)]


def check_exact(machine: Machine, problem: Problem, tile: object = None, shift: int = 0) -> None:
    """Fold a problem without rounding in its product: bit for bit."""
    for ours, expected in zip(run(machine, problem, tile, shift), problem.expected()):
        assert_equal_bits(ours.flatten(), expected.flatten(), "weights")


def check_bound(machine: Machine, problem: Problem) -> int:
    """Fold a problem of any numbers: each weight lies where the product's error lets it; returns the unequal ones."""
    ours, rank = run(machine, problem), len(problem.left)
    product = problem.left.double().t() @ problem.right.double()
    share = product_of_parts(problem.left.dtype, problem.right.dtype, rank)
    error = share * (problem.left.double().abs().t() @ problem.right.double().abs())
    if problem.lower is None:
        old, found = problem.weight.to(FP32), ours[0]
    else:
        old, found = master_weight(problem.weight, problem.lower), master_weight(*ours)
        for part, other in zip(ours, reference.split(found)):
            assert_equal_bits(part.flatten(), other.flatten(), "halves of masters")
    decayed = (old * torch.tensor(problem.decay)).double()
    ends = [(decayed + product + sign * error).to(FP32) for sign in (-1, 1)]
    if problem.stochastic and found.dtype != FP32:
        words = random_words(random_key(SEED, PARAMETER, CLOCK), 0, old.numel())
        ends = [STOCHASTIC_ROUNDINGS[found.dtype](end, weight_bits(words).view(end.shape)) for end in ends]
    low, high = (end.to(found.dtype) for end in ends)
    outside = ~((low <= found) & (found <= high))
    assert not outside.any(), f"{int(outside.sum())} of {outside.numel()} weights are out of bounds"
    if found.dtype != FP32:
        # Errors of up to 2⁻¹⁵ of magnitudes that add up to 0.7 reach few edges of bfloat16, and a third of float16's.
        share = 0.05 if found.dtype == BF16 else 0.4
        assert int((low != high).sum()) <= share * found.numel(), "the bounds are too wide to say anything"
        assert bool(((ours[0].double() - problem.expected()[0].double()).abs() <= (high - low).double()).all())
    return int((ours[0] != problem.expected()[0]).sum())


@pytest.mark.parametrize("machine", SEEN, ids=str)
@pytest.mark.parametrize("rank", [4, pytest.param(16, marks=pytest.mark.slow), 40])
@pytest.mark.parametrize("kind", DTYPES)
def test_exact_sums_give_the_definitions_bits(machine: Machine, kind: str, rank: int) -> None:
    """Tiles that end inside the weight, in both directions, and ranks that are no multiple of a step."""
    check_exact(machine, exact(72, 136, rank, kind))


@pytest.mark.parametrize("machine", OTHERS, ids=str)
@pytest.mark.parametrize("kind", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_other_capabilities_give_the_definitions_bits(machine: Machine, kind: str) -> None:
    check_exact(machine, exact(72, 136, 40, kind))


@pytest.mark.parametrize("machine", SEEN, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (33, 65), (7, 200)], ids=str)
@pytest.mark.parametrize("kind", ["bfloat16", *(pytest.param(kind, marks=pytest.mark.slow) for kind in REST)])
def test_odd_sizes_are_folded_element_by_element(machine: Machine, kind: str, shape: tuple[int, int]) -> None:
    check_exact(machine, exact(*shape, 5, kind))


@pytest.mark.parametrize("machine", SEEN, ids=str)
def test_views_that_begin_anywhere_are_folded(machine: Machine) -> None:
    """All tensors lie one element behind an aligned place."""
    check_exact(machine, exact(40, 72, 8), shift=1)


@pytest.mark.parametrize("machine", SEEN, ids=str)
@pytest.mark.parametrize("shape", [(72, 136), (33, 65)], ids=str)
def test_masters_equal_the_definitions(machine: Machine, shape: tuple[int, int]) -> None:
    """A bfloat16 weight with a remainder: both halves, bit for bit."""
    check_exact(machine, exact(*shape, 16, remainder=True))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_weights_round_to_nearest_when_asked(kind: str) -> None:
    check_exact(SEEN[0], replace(exact(40, 72, 8, kind), stochastic=False))


@pytest.mark.slow
@pytest.mark.parametrize("machine", [*SEEN, *OTHERS], ids=str)
@pytest.mark.parametrize("rank", [1, 15, 128])
@pytest.mark.parametrize("kind", DTYPES)
def test_every_rank_on_every_capability(machine: Machine, kind: str, rank: int) -> None:
    check_exact(machine, exact(65, 129, rank, kind))
    check_exact(machine, exact(136, 264, rank, kind))


@pytest.mark.parametrize(
    "tile",
    [(16, 16, 16, 32), (32, 64, 32, 64), *(pytest.param(tile, marks=pytest.mark.slow) for tile in LARGE)],
    ids=str,
)
def test_results_do_not_depend_on_the_tile(tile: tuple[int, ...]) -> None:
    """Random words are an element's own: the bits are the definition's for any tile and number of threads."""
    check_exact(SEEN[0], exact(72, 136, 24), fold.FoldTile(*tile))


@pytest.mark.parametrize("machine", SEEN, ids=str)
@pytest.mark.parametrize("kind", ["bfloat16", "master", *(pytest.param(kind, marks=pytest.mark.slow) for kind in REST)])
def test_any_numbers_stay_within_the_stated_bound(machine: Machine, kind: str) -> None:
    """A sum in another order may move a 16-bit weight by one place, where it lies near an edge: few of 8,192 do."""
    problem = inexact(64, 128, 128, remainder=True) if kind == "master" else inexact(64, 128, 128, kind)
    unequal = check_bound(machine, problem)
    assert unequal <= {"float16": 60, "float32": 8192}.get(kind, 8)


# Of a weight of so many columns, the element 2³² is the 64th of a row, and lies in the middle of a tile.
FAR_COLUMNS, FAR_ROW = 2**16 + 8, 1023 * 64


def check_far(machine: Machine) -> None:
    """Fold the tile with element 2³²; of the weight only that tile's rows are there."""
    given, across, key = exact(64, FAR_COLUMNS, 4), -(-FAR_COLUMNS // 128), random_key(SEED, PARAMETER, CLOCK)
    weight, decay = given.weight.clone(), torch.tensor(given.decay)
    launch = machine.module("fold").fold_launch(weight, given.left, given.right, decay, key, None, True)
    left = torch.cat([torch.full((4, FAR_ROW), torch.nan), given.left], dim=1)
    arguments = {**launch.arguments, "left": left, "rows": FAR_ROW + 64}
    far = replace(launch, arguments=arguments, constants={**launch.constants, "FAR": True})
    start = FAR_ROW * FAR_COLUMNS
    machine.run([far], displaced={"weight": 2 * start}, only=[FAR_ROW // 64 * across])
    words = random_words(key, start, weight.numel()).view(weight.shape)[:, :128]
    new = given.weight[:, :128].to(FP32) * decay + given.left.t() @ given.right[:, :128].to(FP32)
    assert_equal_bits(weight[:, :128].flatten(), round_to_bfloat16(new, weight_bits(words)).flatten(), "weights")
    assert torch.equal(weight[:, 128:], given.weight[:, 128:])


def test_rows_of_a_weight_are_rounded_as_in_the_whole() -> None:
    """Whose first row lies in the middle of a tile of the whole; bit for bit, for the products are exact."""
    given = exact(72, 64, 8)
    machine = Machine(90)
    weight, decay, key = given.weight[20:].contiguous(), torch.tensor(given.decay), random_key(SEED, PARAMETER, CLOCK)
    memory = Poisoned(machine.device)
    rows, left, right = (
        there.view(t.shape) for there, t in zip(memory.place([weight, given.left[:, 20:], given.right]),
                                               (weight, given.left[:, 20:], given.right))
    )  # fmt: skip
    there = decay.to(machine.device), key.to(machine.device)
    launch = machine.module("fold").fold_launch(rows, left, right, *there, None, True, machine.warp, start=20 * 64)
    machine.run([launch])
    memory.assert_untouched()
    assert_equal_bits(rows.cpu().flatten(), given.expected()[0][20:].flatten(), "weights")


@pytest.mark.slow
def test_random_words_beyond_2_to_the_32() -> None:
    """Addresses and words of elements take 64 bits."""
    check_far(Machine(80))


@pytest.mark.parametrize(("columns", "far"), [(2**16, False), (2**16 + 8, True)], ids=["up to", "beyond"])
def test_only_weights_beyond_2_to_the_32_pay_for_it(columns: int, far: bool) -> None:
    weight, left, right = (
        torch.empty(shape, dtype=BF16, device="meta") for shape in ((2**16, columns), (4, 2**16), (4, columns))
    )
    assert fold.fold_launch(weight, left, right, CLOCK, CLOCK, None, True).constants["FAR"] is far


@pytest.mark.parametrize(
    ("m", "n", "shift", "access", "programs"),
    [(64, 128, 0, VECTOR, 1), (64, 136, 0, VECTOR, 2), (64, 132, 0, ELEMENT, 6), (60, 64, 0, ELEMENT, 2),
     (64, 64, 1, ELEMENT, 2)],
    ids=["one tile", "two tiles", "odd columns", "odd rows", "unaligned"],
)  # fmt: skip
def test_access_and_tile_follow_addresses_and_sizes(m: int, n: int, shift: int, access: int, programs: int) -> None:
    weight = torch.zeros(m * n + shift, dtype=BF16)[shift:].view(m, n)
    launch = fold.fold_launch(weight, torch.zeros(4, m), torch.zeros(4, n, dtype=BF16), CLOCK, CLOCK, None, True)
    assert (launch.constants["ACCESS"], launch.programs) == (access, programs)


def test_a_weight_is_read_and_written_once() -> None:
    """In whole sectors of memory: 4 bytes an element, and tiles of factors that later programs find in the cache."""
    given, rank = exact(128, 256, 16), 16
    weight, key = given.weight.clone(), random_key(SEED, PARAMETER, CLOCK)
    launch = fold.fold_launch(weight, given.left, given.right, torch.tensor(given.decay), key, None, True)
    arguments = [launch.arguments[name] for name in launch.kernel.arg_names if name in launch.arguments]
    counters = program_of(Recipe(launch, 80)).launch(arguments, (launch.programs,), launch.num_warps)
    tiles, factors = launch.programs, rank * (64 * 4 + 128 * 2)
    assert counters.stores.sectors * 32 == weight.nbytes
    # Decay and key are a sector each, of every warp.
    assert 0 <= counters.loads.sectors * 32 - weight.nbytes - tiles * factors <= tiles * launch.num_warps * 2 * 32
    assert counters.stores.widest == counters.loads.widest == 16


class TestMachineCode:
    """Defects in the compiled code, each of which a fold of two steps over the rank must show."""

    problem = exact(40, 136, 56)

    def compiled(self) -> Program:
        given = self.problem
        launch = fold.fold_launch(
            given.weight, given.left, given.right, torch.ones(()), random_key(0, 0, CLOCK), None, True
        )
        return program_of(Recipe(launch, 80))

    def fails(self, pattern: str, replacement: str, number: int) -> bool:
        machine = Machine(80, edit=lambda program: program.mutant(pattern, replacement, number))
        try:
            check_exact(machine, self.problem)
        except (AssertionError, PtxError):
            return True
        return False

    @pytest.mark.slow
    def test_every_barrier_in_the_loop_is_needed(self) -> None:
        ptx = self.compiled().ptx
        found = [self.fails(r"bar\.sync\s+0;", "", k) for k in range(len(re.findall(r"bar\.sync\s+0;", ptx)))]
        assert found
        assert all(found)

    def test_a_copy_that_is_not_waited_for(self) -> None:
        assert self.fails(r"cp\.async\.wait_group\s+\S+;", "cp.async.wait_group 12;", 0)

    def test_a_product_with_registers_exchanged(self) -> None:
        assert self.fails(r"(mma\.sync[^{]*\{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2", 0)


def loops(machine: Machine) -> None:
    check_exact(machine, exact(40, 136, 56))


def transposed(machine: Machine) -> None:
    check_exact(machine, exact(40, 72, 8, "bfloat16 transposed"))


def in_float32(machine: Machine) -> None:
    check_exact(machine, exact(40, 72, 8, "float32"))


def any_float32(machine: Machine) -> None:
    check_bound(machine, inexact(40, 72, 4, "float32"))


def masters(machine: Machine) -> None:
    check_exact(machine, exact(40, 72, 8, remainder=True))


# Module, what stands there once, what is put there, and the check that must fail.
DEFECTS: dict[str, tuple[str, str, str, Callable[[Machine], None]]] = {
    "inclusive end of the rank": ("fold", "depth < rank - start", "depth <= rank - start", loops),
    "no end of the rank": ("fold", "depth < rank - start", "depth < rank", loops),
    "inclusive end of rows": ("fold", "tl.arange(0, M) < rows", "tl.arange(0, M) <= rows", loops),
    "inclusive end of columns": ("fold", "tl.arange(0, N) < columns", "tl.arange(0, N) <= columns", loops),
    "steps overlap": ("fold", "rows.to(tl.int64) * K", "rows.to(tl.int64) * (K // 2)", loops),
    "words of the tile, not of the weight": ("fold", "tl.load(key), element, ", "tl.load(key), row * 0, ", loops),
    "decay of the update too": (
        "fold", "* tl.load(decay) + product", "* tl.load(decay) + product * tl.load(decay)", loops,
    ),
    "no low part": ("tiles", "tl.dot(high, right, tl.dot(low, right, total))", "tl.dot(high, right, total)", loops),
    "no low part of the right factor": (
        "tiles", "tl.dot(left, high, tl.dot(left, low, total))", "tl.dot(left, high, total)", transposed,
    ),
    "no last part in float32": (
        "tiles", "tl.dot(left_low, right_high, tl.dot(left_rest", "(tl.dot(left_rest", in_float32,
    ),
    "no last part of the right factor in float32": (
        "tiles", "tl.dot(left_high, right_low, tl.dot(left_low, right_high, tl.dot(left_rest",
        "(tl.dot(left_low, right_high, tl.dot(left_rest", any_float32,
    ),
    "remainder without a sign": (
        "fold", "other=0).to(tl.int32)", "other=0).to(tl.uint16, bitcast=True).to(tl.int32)", masters,
    ),
    "master truncated": ("fold", "(bits + 0x8000) >> 16", "bits >> 16", masters),
    "words without the element's high half": (
        "tiles", "((start + offsets) >> 32).to", "((start + offsets) >> 63).to", check_far,
    ),
    "high half of the tile's first element": ("tiles", "((start + offsets) >> 32)", "(start >> 32)", check_far),
}  # fmt: skip
FAST = {"inclusive end of the rank", "no low part", "master truncated"}


@pytest.mark.parametrize(
    "defect", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in DEFECTS]
)
def test_a_defect_is_seen(defect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new, check = DEFECTS[defect]
    machine = replace(edited_kernels(module, old, new, tmp_path, monkeypatch), sm=80)
    with pytest.raises((AssertionError, PtxError)):
        check(machine)


def test_a_slot_in_one_bfloat16_breaks_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the bound: many weights leave it, not just some that lie near an edge."""
    old, new = "tl.dot(high, right, tl.dot(low, right, total))", "tl.dot(high, right, total)"
    machine = replace(edited_kernels("tiles", old, new, tmp_path, monkeypatch), sm=80)
    with pytest.raises(AssertionError, match=r"\d\d+ of 8192 weights are out of bounds"):
        check_bound(machine, inexact(64, 128, 128))


# The instruction with which each target multiplies matrices.
MATRIX_INSTRUCTIONS = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 120: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


@pytest.mark.parametrize(
    "target", [pytest.param(target, marks=[] if target == 90 else pytest.mark.slow) for target in MATRIX_INSTRUCTIONS]
)
def test_a_target_multiplies_on_its_matrix_units(target: int) -> None:
    """Without spills, and with programs that fit the shared memory of small GPUs twice."""
    names = [v for v in kernel_code.KERNELS if v.name in ("fold/bf16", "project/bf16-bf16")]
    for variant in names:
        launch = variant.launch(target)
        compiled = kernel_code.compile_for(launch, target)
        assert MATRIX_INSTRUCTIONS[target] in compiled.asm["ptx"]
        found = kernel_code.resources(compiled, launch, target, variant.elements_per_program)
        assert (found.spill_bytes, found.local_accesses, found.widest_load_bytes) == (0, 0, 16)
        assert 2 * found.shared_bytes <= 99 << 10
