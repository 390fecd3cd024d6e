"""The compiled AdamW kernels take the definition's steps: in an emulator of a GPU's machine code, or on the GPU."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from lisa_kernels.ops import tiles

from .kernel_checks import (
    BF16,
    EXTREMES,
    FP16,
    FP32,
    HYPER,
    Case,
    assert_equal_bits,
    check_steps,
    check_training,
    check_without_epsilon,
    launches_of,
    normal,
    schedule,
)
from .kernel_runs import MACHINES, Machine, Poisoned, kernel_code, program_of

SIZES = (1, 255, 256, 257, 264, 4095, 4096, 4097) * 2
# Every size in both dtypes.
SAME = {"params": (FP32,) * 8 + (BF16,) * 8, "grads": (FP32,) * 8 + (BF16,) * 8}
MOMENTS = pytest.mark.parametrize("block_size", [256, None], ids=["8 bits", "32 bits"])
# Ways to lay a program's elements out: constants of `tiles` for warps, elements per thread and the largest tile.
LAYOUTS = {
    "two blocks": (8, 16, 4096), "few per thread": (4, 8, 4096), "many per thread": (2, 32, 4096),
    "blocks gone over twice": (1, 16, 1024),
}  # fmt: skip


@pytest.fixture(params=MACHINES, ids=str)
def machine(request: pytest.FixtureRequest) -> Machine:
    """An emulated capability, and the GPU where there is one."""
    found: Machine = request.param
    return found


@MOMENTS
def test_steps_equal_the_definition_at_every_size(machine: Machine, block_size: int | None) -> None:
    """One launch per dtypes and access for all sizes: no tensor touches its neighbours or what lies around it."""
    check_steps(Case(SIZES, **SAME, block_size=block_size), machine)


def test_an_older_gpus_code_takes_the_same_steps() -> None:
    """It has no instruction for some conversions."""
    check_steps(Case(SIZES, (BF16,), (BF16,)), Machine(80))


@MOMENTS
def test_errors_of_approximate_instructions_reach_weights_only(block_size: int | None) -> None:
    """Drawn anew up to what the instructions may err by: not one code or absmax changes, weights stay in bounds."""
    case = Case(SIZES[:8], (FP32,), (FP32,), block_size=block_size, hypers=(HYPER,))
    plain, _ = check_steps(case, Machine(90))
    moved, _ = check_steps(case, Machine(90, fuzz=1))
    assert any(not torch.equal(one, other) for one, other in zip(plain[0], moved[0]))


@pytest.mark.parametrize("block_size", [16, 2048, 8192])
def test_steps_equal_the_definition_for_other_blocks(machine: Machine, block_size: int) -> None:
    """Many in a row of a warp, one over all warps, and one that is gone over twice."""
    check_steps(Case((2 * max(block_size, 2048) + 8,), (BF16,), (BF16,), block_size), machine)


@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP16, marks=pytest.mark.slow)], ids=["bfloat16", "float16"])
def test_steps_round_to_nearest_when_asked(machine: Machine, dtype: torch.dtype) -> None:
    """Ties to even; no random number is used for moments either."""
    check_steps(Case((1000, 264), (dtype,), (dtype,), stochastic=False), machine)


@MOMENTS
def test_views_that_begin_anywhere_are_stepped(machine: Machine, block_size: int | None) -> None:
    """All tensors lie one element behind an aligned place."""
    check_steps(Case((300, 4096) * 2, (FP32, FP32, BF16, BF16), (FP32, FP32, BF16, BF16), block_size, shift=1), machine)


def test_many_small_tensors_beside_a_large_one(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The large one has a launch of its own, without a table, and its odd end a place in the table."""
    monkeypatch.setattr(machine.module("adamw8"), "LARGE", 2)
    sizes = [*(1 + 37 * k % 301 for k in range(30)), 4096 + 7, 8, 4096, 8, 8, 8]
    case = Case(sizes, (FP32, BF16), (FP32, BF16))
    names = [launch.kernel.__name__ for launch in launches_of(case, machine, case.state(), case.steps()[0])]
    assert sorted(set(names)) == ["adamw8_many", "adamw8_one"]
    check_steps(case, machine)


@pytest.mark.parametrize("extreme", EXTREMES)
def test_steps_equal_the_definition_on_extreme_gradients(machine: Machine, extreme: str) -> None:
    values = EXTREMES[extreme]
    """What underflows, what nearly overflows, and blocks of nothing but zeros."""
    case = Case((1000, 999), hypers=(HYPER,) * 3, values=(values, values[1:]))
    check_steps(case, machine)
    check_steps(replace(case, block_size=None), machine)


@MOMENTS
@pytest.mark.parametrize("scale", [0.0, 1e-23, 1e-20, 1e-18, 1e-15], ids=str)
def test_without_an_epsilon_no_weight_leaps(machine: Machine, scale: float, block_size: int | None) -> None:
    """The approximate root of a subnormal second moment is zero, and m over it would be infinite."""
    check_without_epsilon(machine, normal(264, 1) * scale, block_size)


@MOMENTS
@pytest.mark.parametrize("still", ["no rate", "no gradient"])
def test_weights_are_exact_where_no_root_is_involved(machine: Machine, still: str, block_size: int | None) -> None:
    """With a rate or moments of zero the update is zero whatever the root; decay and stochastic rounding remain."""
    hyper, values = (HYPER._replace(lr=0.0), None) if still == "no rate" else (HYPER, [torch.zeros(n) for n in SIZES])
    ours, expected = check_steps(Case(SIZES, **SAME, block_size=block_size, hypers=(hyper,), values=values), machine)
    for weight, other in zip(ours[0], expected[0]):
        assert_equal_bits(weight, other, "weights")


@MOMENTS
def test_float16_weights_are_rounded_up_or_down_as_the_definition_says(block_size: int | None) -> None:
    """Subnormal ones too; bit for bit, for without a gradient no root is involved and the decay alone is rounded."""
    hyper = HYPER._replace(weight_decay=20.0)
    case = Case((264,), (FP16,), (FP16,), block_size, hypers=(hyper,), values=[torch.zeros(264)])
    ours, expected = check_steps(case, Machine(90))
    assert_equal_bits(ours[0][0], expected[0][0], "weights")
    assert int((expected[0][0] != case.state()[0][0]).sum()) > 50


@MOMENTS
def test_a_skipped_step_touches_nothing(machine: Machine, block_size: int | None) -> None:
    """NaN gradients included, at every size."""
    case = Case(SIZES, **SAME, block_size=block_size, values=[torch.full((n,), float("nan")) for n in SIZES])
    before, memory = case.state(), Poisoned(machine.device)
    for row, moments in enumerate(before[1:]):
        for moment in moments:
            moment.copy_(normal(moment.numel(), row).abs() * 50)
    ours, step = tuple(memory.place(tensors) for tensors in before), case.steps(skip=True)[0].on(memory)
    machine.run(launches_of(case, machine, ours, step), memory.tensors)
    for mine, theirs in zip(ours, before):
        for one, other in zip(mine, theirs):
            assert_equal_bits(one, other, "elements")
    memory.assert_untouched()


@MOMENTS
@pytest.mark.parametrize("start", [2**31, 2**32 - 4096], ids=["at 2^31", "over 2^32"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_elements_far_into_a_tensor(machine: Machine, dtype: torch.dtype, start: int, block_size: int | None) -> None:
    """Tables say that tensors begin 2³² elements before what is there: addresses and random words take 64 bits."""
    check_steps(Case((8192, 8192), (dtype,), (dtype,), block_size, start=start), machine)


@pytest.mark.parametrize("start", [2**31, 2**32 - 4096], ids=["at 2^31", "over 2^32"])
def test_elements_far_into_a_tensor_without_a_table(start: int) -> None:
    """The same for the kernel that takes one large tensor."""
    check_steps(Case((8192,), (BF16,), (BF16,), start=start), Machine(90))


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if "twice" in name else pytest.mark.slow) for name in LAYOUTS]
)
def test_results_do_not_depend_on_the_layout(machine: Machine, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warps, elements per thread and tiles change nothing, not even in the last place of a weight."""
    case = Case((4096, 4096), (FP32,), (FP32,), 2048, hypers=(HYPER,))
    usual, [launch] = check_steps(case, machine)[0], launches_of(case, machine, case.state(), case.steps()[0])
    for name, value in zip(("MIN_WARPS", "ELEMENTS_PER_THREAD", "LARGEST_TILE"), LAYOUTS[layout]):
        monkeypatch.setattr(tiles, name, value)
    other, [another] = check_steps(case, machine)[0], launches_of(case, machine, case.state(), case.steps()[0])
    assert (launch.constants, launch.num_warps) != (another.constants, another.num_warps)
    for one, two in zip(usual, other):
        for mine, theirs in zip(one, two):
            assert_equal_bits(mine, theirs, "elements")


@MOMENTS
def test_new_values_run_what_was_compiled(machine: Machine, block_size: int | None) -> None:
    """Hyper-parameters, step counts, sizes and addresses change; the compiled objects are the same."""
    steps = schedule(4)
    check_steps(Case((4096, 4096, 264, 264), (FP32,), (FP32,), block_size, hypers=steps[:1]), machine)
    before = compiled(machine, block_size)
    check_steps(Case((6144, 2048, 272, 1024, 8), (FP32,), (FP32,), block_size, hypers=steps), machine)
    assert compiled(machine, block_size) == before


def compiled(machine: Machine, block_size: int | None) -> int:
    """Return how many compiled forms of the step's kernels there are."""
    if machine.sm is not None:
        return program_of.cache_info().currsize
    kernels = machine.module("adamw8")
    names = ("adamw32_many",) if block_size is None else ("adamw8_one", "adamw8_many")
    device = torch.cuda.current_device()
    return sum(len(getattr(kernels, name).device_caches[device][0]) for name in names)


def test_kernels_are_compiled_as_the_launcher_compiles_them() -> None:
    """Triton's own view of a launch's arguments: the same types and constants, and nothing known about their values."""
    jit, compiler = importlib.import_module("triton.runtime.jit"), importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    backend = compiler.make_backend(target)
    for block_size in (256, None):
        case = Case((1, 4096, 4104), (FP32, BF16), (FP32, BF16), block_size=block_size)
        for launch in launches_of(case, Machine(90), case.state(), case.steps()[0]):
            kernel, options = launch.kernel, {**launch.constants, **launch.options()}
            bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
            bound, known, rest = bind(**launch.arguments, **options, debug=False)
            _, types, constants, attributes = kernel._pack_args(backend, options, bound, known, rest)
            assert types == kernel_code.signature(launch)
            assert {kernel.arg_names[place]: value for (place,), value in constants.items()} == launch.constants
            assert not any(attributes.values())


def test_a_hundred_steps_of_training_follow_the_definition(machine: Machine) -> None:
    """Trajectories that see only their own bfloat16 weights, rounded stochastically, stay together."""
    check_training(Case((264, 264), (BF16,), (BF16,), hypers=schedule(100)), machine)
