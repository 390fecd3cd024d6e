"""Defects in machine code, in Triton and in what a launch says fail the checks that the kernels pass."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from ptx import GlobalRaceError, MisalignedError, OutOfBoundsError, Program, PtxError, SharedRaceError
from torch import Tensor

from lisa_kernels.ops.random_bits import key_base, keys_at
from lisa_kernels.ops.tiles import COUNT_COLUMN, WHOLE, Launch

from . import kernel_checks
from .kernel_checks import (
    BF16,
    EXTREMES,
    FP32,
    HYPER,
    Case,
    State,
    Step,
    check_codec,
    check_norm,
    check_reciprocal,
    check_steps,
    check_training,
    check_without_epsilon,
    launches_of,
    normal,
    schedule,
)
from .kernel_runs import Machine, Recipe, edited_kernels, program_of

# Two tensors of one dtype, of which a tile ends in the middle of a vector's place.
SMALL = Case((264, 1000), (FP32,), (FP32,))
SMALL_BF16 = Case((264, 1000), (BF16,), (BF16,))
KEY = keys_at(torch.tensor([key_base(3, 2)]), torch.tensor(8))[0]
AT_TRITONS_LINE = r"triton_kernel\.py:\d+"


def fails(check: Callable[[], object], *kinds: type[Exception]) -> None:
    """Require that a check fails, by what it finds or by a fault."""
    with pytest.raises(kinds or (AssertionError, PtxError)):
        check()


class TestLaunches:
    """Launches that say something wrong, each reported at the line of Triton."""

    def launch(self, case: Case) -> tuple[Launch, list[Tensor]]:
        """Return the only launch of a case's first step and the tensors in its table."""
        state, step = case.state(), case.steps()[0]
        [launch] = launches_of(case, Machine(90), state, step)
        return launch, [tensor for tensors in (*state, step.grads) for tensor in tensors]

    def test_a_count_beyond_the_tensor(self) -> None:
        """A table that claims another vector of elements makes accesses behind the tensors' ends."""
        launch, tensors = self.launch(replace(SMALL, sizes=(264, 264)))
        with pytest.raises(OutOfBoundsError, match=AT_TRITONS_LINE + r".*behind the end of buffer"):
            Machine(90).run([launch], tensors, {COUNT_COLUMN: -8})

    def test_wide_accesses_to_an_unaligned_tensor(self) -> None:
        """A view that begins at element 1 must not be taken for a whole tile."""
        launch, _ = self.launch(Case((4096,), (FP32,), (FP32,)))
        weight = torch.zeros(4097)[1:]
        wrong = replace(launch, arguments={**launch.arguments, "param": weight})
        assert wrong.constants["ACCESS"] == WHOLE
        with pytest.raises(MisalignedError, match=AT_TRITONS_LINE):
            Machine(90).run([wrong])

    def test_two_programs_on_one_tile(self) -> None:
        """A work list with an item twice: a race between programs."""
        launch, tensors = self.launch(Case((2048, 2048), (FP32,), (FP32,)))
        work = launch.arguments["work"]
        assert isinstance(work, torch.Tensor)
        twice = replace(launch, arguments={**launch.arguments, "work": work[:1].repeat(2)})
        with pytest.raises(GlobalRaceError, match=AT_TRITONS_LINE):
            Machine(90).run([twice], tensors)

    def test_a_missing_tile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A launch of one program less leaves elements behind."""

        def short(*arguments: object) -> list[Launch]:
            return [replace(launch, programs=launch.programs - 1) for launch in launches_of(*arguments)]  # type: ignore[arg-type]

        monkeypatch.setattr(kernel_checks, "launches_of", short)
        fails(lambda: check_steps(SMALL, Machine(90)), AssertionError)

    @pytest.mark.parametrize("check", [check_steps, check_training])
    def test_keys_without_the_clock(self, check: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
        """Random numbers that repeat from step to step are seen in single steps and in a trajectory."""

        def repeating(case: Case, machine: Machine, state: State, step: Step) -> list[Launch]:
            return launches_of(case, machine, state, replace(step, keys=case.steps()[0].keys))

        monkeypatch.setattr(kernel_checks, "launches_of", repeating)
        case = replace(SMALL_BF16, sizes=(264, 264), hypers=schedule(20))
        fails(lambda: check(case, Machine(90)), AssertionError)


class TestMachineCode:
    """Edits of the PTX."""

    LARGE_BLOCK = Case((4096, 4096), (BF16,), (BF16,), 2048, hypers=(HYPER,))

    def run(self, case: Case, edit: Callable[[Program], Program] | None) -> None:
        check_steps(case, Machine(90, edit=edit))

    def compiled(self, case: Case) -> Program:
        [launch] = launches_of(case, Machine(90), case.state(), case.steps()[0])
        return program_of(Recipe(launch, 90))

    def test_a_dropped_barrier(self) -> None:
        """Each barrier of the search for a block's largest moments is needed."""
        barriers = self.compiled(self.LARGE_BLOCK).ptx.count("bar.sync")
        assert barriers > 1
        for number in range(barriers):
            with pytest.raises(SharedRaceError, match=AT_TRITONS_LINE):
                self.run(self.LARGE_BLOCK, lambda program, n=number: program.mutant(r"bar\.sync\s+0;", "", n))

    @pytest.mark.parametrize("distance", [1, 2, 4, 8])
    def test_a_shuffle_over_a_wrong_distance(self, distance: int) -> None:
        """A butterfly that leaves lanes out misses the largest of a block."""
        pattern = rf"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), {distance},"
        case = replace(SMALL_BF16, sizes=(4096, 4096))
        fails(lambda: self.run(case, lambda program: program.mutant(pattern, r"\1, 16,")), AssertionError)

    def test_an_inclusive_mask(self) -> None:
        """`<=` in any of the comparisons with a tensor's end lets through what lies behind it."""
        # Ends at the first vector of each step of a tile, and of a block.
        case = replace(SMALL, sizes=(8, 72, 136, 200, 256))
        compare = r"setp\.lt\.s32"
        count = len(re.findall(compare, self.compiled(case).ptx))
        assert count > 4
        for number in range(count):
            with pytest.raises(OutOfBoundsError, match=AT_TRITONS_LINE):
                self.run(case, lambda program, n=number: program.mutant(compare, "setp.le.s32", n))


Check: TypeAlias = Callable[[Machine], object]


def steps_of(case: Case) -> Check:
    return lambda machine: check_steps(case, machine)


def codes_of(values: Tensor, key: Tensor | None = None) -> Check:
    return lambda machine: check_codec(machine, values, True, 256, key)


def norm_of(grad: Tensor) -> Check:
    return lambda machine: check_norm(machine, [grad])


def reciprocals(machine: Machine) -> None:
    check_reciprocal(machine, 1 << 14)


def no_epsilon(machine: Machine) -> None:
    check_without_epsilon(machine, normal(264, 1) * 1e-20, None)


STEPS, STEPS_BF16, WHOLE_TILES = (
    steps_of(SMALL), steps_of(SMALL_BF16), steps_of(replace(SMALL_BF16, sizes=(2048, 2048)))
)  # fmt: skip
MOMENTS_32 = steps_of(replace(SMALL, block_size=None))
ODD = steps_of(replace(SMALL, sizes=(255, 999)))
SPREAD = steps_of(replace(SMALL, sizes=(1000, 992), values=(EXTREMES["all scales"], EXTREMES["all scales"][:992])))
FAR = steps_of(Case((2048, 2048), (BF16,), (BF16,), start=2**32 + 2**31, hypers=(HYPER,)))
TWO_PASSES = steps_of(Case((8192, 8192), (BF16,), (BF16,), 8192, hypers=(HYPER,)))
TINY, NANS = norm_of(normal(5000, 1) * 1e-30), norm_of(torch.tensor([1.0, math.nan, math.inf, 2.0] * 3))

# Module, what stands there once, what is put there, and the check that must fail.
DEFECTS: dict[str, tuple[str, str, str, Check]] = {
    "inclusive mask of vectors": ("tiles", "mask = offsets + SHIFT < left", "mask = offsets + SHIFT <= left", STEPS),
    "inclusive mask of elements": ("tiles", "[None, None, :]) < left", "[None, None, :]) <= left", ODD),
    "half of the key": (
        "tiles", "(start.to(tl.uint32) >> 2) ^ mix32(low) ^ (key >> 32).to(tl.uint32)",
        "(start.to(tl.uint32) >> 2) ^ mix32(low)", STEPS,
    ),
    "one word for four elements": ("tiles", "return hashes * (once * twice)", "return hashes", STEPS),
    "a hash for eight elements": ("tiles", "state ^ (index >> 2)", "state ^ (index >> 3)", STEPS),
    "weights rounded by the first moment's number": (
        "tiles", "return (words * WEIGHT_FACTOR) >> 16", "return words >> 16", STEPS_BF16
    ),
    "words without the element's high half": ("tiles", "(start >> 32).to", "(start >> 63).to", FAR),
    "starts in 32 bits": (
        "adamw8", "start = tile * ELEMENTS", "start = (tile.to(tl.int32) * ELEMENTS).to(tl.int64)", FAR
    ),
    "one number for both moments": ("tiles", "return words & 0xFFFFF", "return words >> 12", STEPS),
    "weights rounded half a place up": ("tiles", "+ bits16) >> 16", "+ bits16 + 0x8000) >> 16", STEPS_BF16),
    "weights truncated": ("tiles", "+ bits16) >> 16", ") >> 16", STEPS_BF16),
    "16-bit halves exchanged": ("tiles", "tl.join(low, high)", "tl.join(high, low)", WHOLE_TILES),
    "no floor of v": ("blockwise8", "V_BIASED_ZERO + 1)", "V_BIASED_ZERO)", SPREAD),
    "zero of m": ("blockwise8", "scaled > threshold", "scaled >= 0", SPREAD),
    "m rounded half a code down": ("blockwise8", "biased = bits20 + M_BIAS", "biased = (bits20 >> 1) + M_BIAS", STEPS),
    "v rounded half a code down": (
        "blockwise8", "+ bits20) >> 20\n    smallest", "+ (bits20 >> 1)) >> 20\n    smallest", STEPS
    ),
    "sign of zero": (
        "blockwise8", "(x.to(tl.uint32, bitcast=True) >> 24) & 128", "tl.where(x < 0, 128, 0)",
        codes_of(EXTREMES["minus zeros"]),
    ),
    "decoded a place low": (
        "blockwise8", "tl.constexpr(1.0666669607162476)", "tl.constexpr(1.0666668)", codes_of(normal(264, 1), KEY)
    ),
    "floor of absmax": (
        "blockwise8", "tl.constexpr(2.0**-120)", "tl.constexpr(2.0**-122)", codes_of(EXTREMES["zeros"])
    ),
    "reciprocal one place low": ("blockwise8", "above, r)", "r, r)", reciprocals),
    "reciprocal that overflows": ("blockwise8", "tl.minimum(x, LARGEST)", "x", reciprocals),
    "bytes of m exchanged": ("blockwise8", "tl.join(even, odd)", "tl.join(odd, even)", WHOLE_TILES),
    "no gradient scale": ("adamw8", " * grad_scale\n    m = tl.fma(load_m", "\n    m = tl.fma(load_m", STEPS),
    "m rounded twice": (
        "adamw8", "m = tl.fma(load_floats(m_pointer, offsets, SHIFT, mask, VECTOR, ACCESS), carry1, g)",
        "m = load_floats(m_pointer, offsets, SHIFT, mask, VECTOR, ACCESS) * carry1 + g", MOMENTS_32,
    ),
    "ε inside the root": ("adamw8", "tl.sqrt(v) + eps", "tl.sqrt(v + eps)", STEPS),
    "no ε": ("adamw8", "tl.sqrt(v) + eps", "tl.sqrt(v)", no_epsilon),
    "decay after the update": (
        "adamw8", "tl.fma(-((m * root) * root), step_size, weight * decay)",
        "tl.fma(-((m * root) * root), step_size, weight) * decay", STEPS,
    ),
    "a root too coarse": ("adamw8", "root = tl.rsqrt", "root = 1.000001 * tl.rsqrt", STEPS),
    "scalars of another tensor": ("adamw8", "tile, scalars + 8 * row, keys", "tile, scalars, keys", STEPS),
    "key of another tensor": ("adamw8", "tile, scalars + 8 * row, keys + row", "tile, scalars + 8 * row, keys", STEPS),
    "random words of another place": ("adamw8", "state, 0, STOCHASTIC", "state, 1, STOCHASTIC", STEPS),
    "a second pass with the first's words": (
        "adamw8", "state, part * TILE, STOCHASTIC", "state, 0, STOCHASTIC", TWO_PASSES
    ),
    "moments of another order": (
        "adamw8", "lists = (params, grads, m_codes, m_absmax, v_codes, v_absmax)",
        "lists = (params, grads, m_codes, v_absmax, v_codes, m_absmax)", STEPS,
    ),
    "a NaN below infinity": ("grad_norm", "program_id(0), top.to", "program_id(0), tl.minimum(top, EXPONENT).to", NANS),
    "squares off by a power of two": ("grad_norm", "total * unit * unit", "total * unit", TINY),
    "squares without a scale": (
        "grad_norm", "scale = (254 * ONE - unit).to(tl.float32, bitcast=True)",
        "scale, unit = 1.0, 127 * ONE + 0 * unit", TINY,
    ),
}  # fmt: skip

# The others take longer together than a plain run may.
FAST = {
    "starts in 32 bits", "weights rounded half a place up", "no floor of v",
    "m rounded half a code down", "reciprocal one place low", "a NaN below infinity",
}  # fmt: skip


@pytest.mark.parametrize(
    "defect", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in DEFECTS]
)
def test_a_defect_in_triton_is_seen(defect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new, check = DEFECTS[defect]
    machine = edited_kernels(module, old, new, tmp_path, monkeypatch)
    fails(lambda: check(machine))


@pytest.mark.slow
def test_unchanged_copies_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So what the tests above see are the defects, not the copying."""
    machine = edited_kernels("tiles", "def mix32(x)", "def mix32(x)", tmp_path, monkeypatch)
    for check in {id(check): check for *_, check in DEFECTS.values()}.values():
        check(machine)
