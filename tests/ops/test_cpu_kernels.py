"""The C++ kernels equal the references bit for bit, on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from lisa_kernels import native
from lisa_kernels.errors import InputError
from lisa_kernels.native import DTYPE_CODES
from lisa_kernels.ops import adamw8, blockwise8, fold, grad_norm
from lisa_kernels.ops.adamw8 import Hyper, step_scalars
from lisa_kernels.ops.adamw8 import cpu_kernel as adamw8_kernel
from lisa_kernels.ops.adamw8 import reference as adamw8_reference
from lisa_kernels.ops.blockwise8 import cpu_kernel as blockwise8_kernel
from lisa_kernels.ops.blockwise8 import reference as blockwise8_reference
from lisa_kernels.ops.dispatch import CPU_OPS, KERNEL_OPS, kernels_in_use
from lisa_kernels.ops.fold import cpu_kernel as fold_kernel
from lisa_kernels.ops.fold import reference as fold_reference
from lisa_kernels.ops.grad_norm import cpu_kernel as grad_norm_kernel
from lisa_kernels.ops.grad_norm import reference as grad_norm_reference
from lisa_kernels.ops.random_bits import (
    key_base,
    keys_at,
    moment_bits,
    random_key,
    random_words,
    round_to_bfloat16,
    weight_bits,
)

LIBRARY = native.load()
needs_library = pytest.mark.skipif(LIBRARY is None, reason=native.why_absent())

SIZES = (0, 1, 255, 256, 257, 4097, 70000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HYPER = Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2)
ROUNDINGS = pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
STEPS = 3

# Lists of weights, then of the moments: m's codes and absmax and v's, or m and v in float32.
State: TypeAlias = tuple[list[Tensor], ...]


def instruction_sets() -> list[int]:
    return [] if LIBRARY is None else list(range(LIBRARY.instruction_set + 1))


@pytest.fixture(params=instruction_sets(), ids=[native.INSTRUCTION_SETS[index] for index in instruction_sets()])
def library(request: pytest.FixtureRequest) -> native.Library:
    """The library, made to use one of the instruction sets that this machine has."""
    assert LIBRARY is not None
    return replace(LIBRARY, instruction_set=request.param)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def bits(tensor: Tensor) -> Tensor:
    """Reinterpret as integers, so that equality tells −0 from 0 and sees every last place."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_equal_bits(ours: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
    for index, (one, other) in enumerate(zip(ours, reference, strict=True)):
        unequal = bits(one) != bits(other)
        assert not unequal.any(), f"tensor {index}: {int(unequal.sum())} of {one.numel()} differ in their bits"


def scalar(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def normal(n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Values whose blocks differ in scale by five decades."""
    generator = torch.Generator().manual_seed(seed)
    decades = torch.rand(-(-n // 100), generator=generator).repeat_interleave(100)[:n] * 5 - 4
    return (torch.randn(n, generator=generator) * 10**decades).to(dtype)


def one_nonzero(n: int) -> Tensor:
    values = torch.zeros(n)
    values[n // 3] = 0.25
    return values


EXTREMES = {
    "denormals": lambda n: normal(n, 5, torch.float32) * 1e-41,
    # The optimizer skips a step with larger gradients, whose squares overflow.
    "1e18": lambda n: normal(n, 5, torch.float32).clamp(-10, 10) * 1e18,
    "zeros": lambda n: torch.zeros(n),
    "minus-zeros": lambda n: -torch.zeros(n),
    "one-nonzero": one_nonzero,
    "all-scales": lambda n: 10 ** (torch.linspace(-44, 19, n)),
}


def state8(sizes: Sequence[int], dtypes: Sequence[torch.dtype], block_size: int = 256) -> State:
    """Weights of the given sizes and dtypes, the dtypes in turn, with codes and absmax of zero moments."""
    weights = [normal(n, 1 + i, dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]
    moments = [
        [torch.zeros(n, dtype=torch.uint8) for n in sizes]
        if codes
        else [torch.zeros(-(-n // block_size)) for n in sizes]
        for codes in (True, False, True, False)
    ]
    return (weights, *moments)


def state32(sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> State:
    weights = state8(sizes, dtypes)[0]
    return weights, [torch.zeros(n) for n in sizes], [torch.zeros(n) for n in sizes]


def copies(state: State) -> State:
    return tuple([tensor.clone() for tensor in tensors] for tensors in state)


def gradients(sizes: Sequence[int], dtypes: Sequence[torch.dtype], step: int) -> list[Tensor]:
    return [normal(n, 20 * step + i, dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]


def arrays(k: int, step: int, seed: int = 3, skip: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Scalars, keys and skip of a step; each tensor has taken a step more than the one before it."""
    keys = keys_at(torch.tensor([key_base(seed, index) for index in range(k)], dtype=torch.int64), scalar(step + 7))
    return step_scalars(torch.arange(k) + step, HYPER, scalar(0.7, torch.float32)), keys, scalar(skip, torch.bool)


Update: TypeAlias = Callable[[State, list[Tensor], tuple[Tensor, Tensor, Tensor]], None]


def kernel8(library: native.Library, block_size: int, stochastic: bool) -> Update:
    return lambda state, grads, shared: adamw8_kernel.adamw8_(
        library, state[0], grads, *state[1:], *shared, block_size, stochastic
    )


def reference8(block_size: int, stochastic: bool) -> Update:
    return lambda state, grads, shared: adamw8_reference.adamw8_(
        state[0], grads, *state[1:], *shared, block_size, stochastic
    )


def kernel32(library: native.Library, stochastic: bool) -> Update:
    return lambda state, grads, shared: adamw8_kernel.adamw32_(
        library, state[0], grads, *state[1:], *shared, stochastic
    )


def reference32(stochastic: bool) -> Update:
    return lambda state, grads, shared: adamw8_reference.adamw32_(state[0], grads, *state[1:], *shared, stochastic)


def run(update: Update, state: State, steps: Sequence[list[Tensor]], seed: int = 3) -> State:
    """Take steps on a copy of the state and return it."""
    state = copies(state)
    for step, grads in enumerate(steps, start=1):
        update(state, grads, arrays(len(grads), step, seed))
    return state


def assert_equal_states(ours: State, reference: State) -> None:
    for one, other in zip(ours, reference, strict=True):
        assert_equal_bits(one, other)


@needs_library
@ROUNDINGS
@pytest.mark.parametrize("block_size", [16, 64, 256, 2048, 65536])
def test_three_steps_of_adamw8_equal_the_reference_at_every_size(
    library: native.Library, block_size: int, stochastic: bool
) -> None:
    """All sizes in one list: none may touch its neighbours."""
    state = state8(SIZES, [torch.bfloat16], block_size)
    steps = [gradients(SIZES, [torch.float32], step) for step in range(1, STEPS + 1)]
    ours = run(kernel8(library, block_size, stochastic), state, steps)
    assert_equal_states(ours, run(reference8(block_size, stochastic), state, steps))


@needs_library
@ROUNDINGS
def test_adamw8_and_adamw32_equal_the_reference_for_every_pair_of_dtypes(
    library: native.Library, stochastic: bool
) -> None:
    """One list of nine tensors: every dtype of weights meets every dtype of gradients."""
    sizes, weights, grads = [4097] * 9, [dtype for dtype in DTYPES for _ in DTYPES], list(DTYPES) * 3
    steps = [gradients(sizes, grads, step) for step in range(1, STEPS + 1)]
    ours = run(kernel8(library, 256, stochastic), state8(sizes, weights), steps)
    assert_equal_states(ours, run(reference8(256, stochastic), state8(sizes, weights), steps))
    ours = run(kernel32(library, stochastic), state32(sizes, weights), steps)
    assert_equal_states(ours, run(reference32(stochastic), state32(sizes, weights), steps))


@needs_library
@ROUNDINGS
def test_adamw32_equals_the_reference_at_every_size(library: native.Library, stochastic: bool) -> None:
    state, steps = state32(SIZES, [torch.bfloat16]), [gradients(SIZES, [torch.bfloat16], 1)]
    ours = run(kernel32(library, stochastic), state, steps)
    assert_equal_states(ours, run(reference32(stochastic), state, steps))


@needs_library
@ROUNDINGS
@pytest.mark.parametrize("extreme", EXTREMES)
def test_adamw8_equals_the_reference_on_extreme_gradients(
    library: native.Library, extreme: str, stochastic: bool
) -> None:
    state, steps = state8([1000] * 3, DTYPES), [[EXTREMES[extreme](1000)] * 3] * STEPS
    ours = run(kernel8(library, 256, stochastic), state, steps)
    assert_equal_states(ours, run(reference8(256, stochastic), state, steps))


@needs_library
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    "sizes", [[200_000], [1000] * 200, [150_000, *[7] * 100, 70_000]], ids=["one-large", "many-small", "mixed"]
)
def test_one_thread_and_two_give_the_same_bits(sizes: list[int]) -> None:
    assert LIBRARY is not None
    state8s, state32s = state8(sizes, DTYPES), state32(sizes, DTYPES)
    steps = [gradients(sizes, [torch.bfloat16], 1)]
    results = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        states = run(kernel8(LIBRARY, 256, True), state8s, steps), run(kernel32(LIBRARY, True), state32s, steps)
        results.append((*states, ([grad_norm_kernel.grad_norm(LIBRARY, steps[0], True)],)))
    for one, two in zip(*results, strict=True):
        assert_equal_states(one, two)


@needs_library
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    "sizes", [[1_300_000], [700_003, *[700] * 300, 400_000]], ids=["one-large", "parts-within-and-across-tensors"]
)
def test_work_of_many_parts_equals_the_reference(sizes: list[int]) -> None:
    """Threads take parts of 2¹⁸ elements; none is left out and none taken twice."""
    assert LIBRARY is not None
    state, steps = state8(sizes, [torch.float32]), [gradients(sizes, [torch.float32], 1)]
    expected = run(reference8(256, True), state, steps)
    state32s = state32(sizes, [torch.float32])
    expected32 = run(reference32(True), state32s, steps)
    for threads in (2, 1):
        torch.set_num_threads(threads)
        assert_equal_states(run(kernel8(LIBRARY, 256, True), state, steps), expected)
        assert_equal_states(run(kernel32(LIBRARY, True), state32s, steps), expected32)
        largest, squares = grad_norm_kernel.grad_norm(LIBRARY, steps[0], True).tolist()
        assert largest == max(float(grad.abs().max()) for grad in steps[0])
        assert squares == pytest.approx(sum(float(grad.double().square().sum()) for grad in steps[0]), rel=1e-12)


@needs_library
def test_another_seed_gives_other_codes_and_the_comparison_sees_it() -> None:
    """Negative control of every equality above."""
    assert LIBRARY is not None
    state, steps = state8([4097], [torch.bfloat16]), [gradients([4097], [torch.float32], 1)]
    ours = run(kernel8(LIBRARY, 256, True), state, steps, seed=4)
    with pytest.raises(AssertionError, match="differ in their bits"):
        assert_equal_states(ours, run(reference8(256, True), state, steps))


@needs_library
def test_a_skipped_step_touches_nothing() -> None:
    assert LIBRARY is not None
    grads, before8, before32 = gradients([300], DTYPES, 1), state8([300], DTYPES), state32([300], DTYPES)
    after8, after32 = copies(before8), copies(before32)
    kernel8(LIBRARY, 256, True)(after8, grads, arrays(1, 1, skip=True))
    kernel32(LIBRARY, True)(after32, grads, arrays(1, 1, skip=True))
    assert_equal_states(after8, before8)
    assert_equal_states(after32, before32)


@needs_library
@ROUNDINGS
@pytest.mark.parametrize("signed", [True, False], ids=["m", "v"])
@pytest.mark.parametrize("n", SIZES)
def test_the_codec_equals_the_reference_at_every_size_and_block_size(
    library: native.Library, n: int, signed: bool, stochastic: bool
) -> None:
    values = normal(n, 1, torch.float32) if signed else normal(n, 1, torch.float32).abs()
    key = random_key(3, 11, scalar(8))
    random20 = moment_bits(random_words(key, 0, n), signed) if stochastic else None
    for block_size in (16, 64, 256, 2048, 65536):
        ours = blockwise8_kernel.quantize(library, values, signed, block_size, key if stochastic else None)
        assert_equal_bits(ours, blockwise8_reference.quantize(values, signed, block_size, random20))
        decoded = blockwise8_kernel.dequantize(library, *ours, signed, block_size)
        assert_equal_bits([decoded], [blockwise8_reference.dequantize(*ours, signed, block_size)])


@needs_library
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("signed", [True, False], ids=["m", "v"])
def test_the_codec_equals_the_reference_on_extreme_values(library: native.Library, signed: bool, extreme: str) -> None:
    """A −0 among second moments included."""
    values = EXTREMES[extreme](1000)
    values = values if signed or extreme == "minus-zeros" else values.abs()
    ours = blockwise8_kernel.quantize(library, values, signed, 256, None)
    assert_equal_bits(ours, blockwise8_reference.quantize(values, signed, 256, None))


@needs_library
@pytest.mark.parametrize("signed", [True, False], ids=["m", "v"])
def test_every_code_decodes_as_the_reference_decodes_it(library: native.Library, signed: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for absmax in (0.0, 2.0**-140, 2.0**-120, 1.0, 3e38):
        arguments = (codes, torch.tensor([absmax]), signed, 256)
        ours, reference = blockwise8_kernel.dequantize(library, *arguments), blockwise8_reference.dequantize(*arguments)
        assert_equal_bits([ours], [reference])


@needs_library
@pytest.mark.parametrize("squares", [True, False], ids=["squares", "largest"])
def test_the_norm_of_gradients_equals_the_references(library: native.Library, squares: bool) -> None:
    """The largest magnitude exactly; sums of float64 squares in another order, hence to 300,000 roundings."""
    sizes = [*SIZES[1:], 300_000]
    grads = gradients(sizes, DTYPES, 1)
    for case in (grads, *([grad] for grad in grads)):
        ours = grad_norm_kernel.grad_norm(library, case, squares)
        reference = grad_norm_reference.grad_norm(case, squares)
        assert ours[0] == reference[0]
        assert float(ours[1]) == pytest.approx(float(reference[1]), rel=3e5 * 2.0**-53, abs=0)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [0, 255, 65535, 65536, 70001])
def test_a_single_nan_or_infinity_is_seen_wherever_it_is(
    library: native.Library, where: int, dtype: torch.dtype
) -> None:
    for bad in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        grads = [torch.ones(100, dtype=dtype), torch.ones(70002, dtype=dtype)]
        grads[1][where] = bad
        largest = grad_norm_kernel.grad_norm(library, grads, False)[0]
        assert largest.isnan() if bad != bad else largest == float("inf")


@needs_library
@ROUNDINGS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (257, 33), (300, 5001)], ids=str)
def test_fold_equals_the_reference_within_a_band_and_across_bands(
    library: native.Library, shape: tuple[int, int], dtype: torch.dtype, stochastic: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(4, shape[0], generator=generator), torch.randn(4, shape[1], generator=generator).to(dtype)
    weight = torch.randn(shape, generator=generator).to(dtype)
    ours, reference = weight.clone(), weight.clone()
    key = random_key(3, 11, scalar(5)) if stochastic else None
    arguments = (left, right, scalar(0.999, torch.float32), key)
    fold_kernel.fold_(library, ours, *arguments)
    fold_reference.fold_(reference, *arguments)
    assert_equal_bits([ours], [reference])


@needs_library
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (257, 33), (300, 5001)], ids=str)
def test_fold_keeps_masters_as_the_reference_does(library: native.Library, shape: tuple[int, int]) -> None:
    """Weights and remainders of all signs and carries, folded twice."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(4, shape[0], generator=generator), torch.randn(4, shape[1], generator=generator)
    weight = torch.randn(shape, generator=generator).to(torch.bfloat16)
    remainder = torch.randint(-(2**15), 2**15, shape, generator=generator).to(torch.int16)
    ours, reference = [weight, remainder], [weight.clone(), remainder.clone()]
    for clock in (5, 6):
        arguments = (left * 1e-3, right, scalar(0.999, torch.float32), random_key(3, 11, scalar(clock)))
        fold_kernel.fold_(library, ours[0], *arguments, ours[1])
        fold_reference.fold_(reference[0], *arguments, reference[1])
    assert_equal_bits(ours, reference)


@needs_library
def test_fold_keeps_its_random_numbers_beyond_two_to_the_32_elements(library: native.Library) -> None:
    start, n = 2**32 - 700, 3000
    weight, update, key = normal(n, 1, torch.bfloat16), normal(n, 2, torch.float32), random_key(3, 11, scalar(5))
    words = random_words(key, start, n)
    expected = round_to_bfloat16(weight.float() * 0.5 + update, weight_bits(words))
    dtype = DTYPE_CODES[torch.bfloat16]
    library.call("fold", weight.data_ptr(), None, update.data_ptr(), n, start, 0.5, int(key), dtype, True)
    assert_equal_bits([weight], [expected])


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_floats_are_read_and_rounded_to_nearest_even_as_torch_does(
    library: native.Library, dtype: torch.dtype
) -> None:
    """All 65,536 patterns are read; sums near and at the middles between them, and random patterns, are rounded."""
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    near = torch.cat([weight.float() * factor for factor in (0.0, 1.0, 2.0**-9, 2.0**-12, -(2.0**-12) * 1.01)])
    random = torch.randint(-(2**31), 2**31, (2**18,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    update = torch.cat([near, random.view(torch.float32)])
    weights = weight.repeat(update.numel() // weight.numel())
    expected = (weights.float() + update).to(dtype)
    pointers = weights.data_ptr(), None, update.data_ptr()
    library.call("fold", *pointers, update.numel(), 0, 1.0, 0, DTYPE_CODES[dtype], False)
    number = ~expected.isnan()
    assert torch.equal(weights.isnan(), ~number)
    assert_equal_bits([weights[number]], [expected[number]])


@needs_library
def test_the_ops_run_the_kernels_on_cpu_tensors() -> None:
    assert LIBRARY is not None
    state, grads, shared = state8([1000, 300], DTYPES), gradients([1000, 300], DTYPES, 1), arrays(2, 1)
    through_op, named = copies(state), dict(zip(("scalars", "keys", "skip"), shared))
    adamw8.adamw8_(through_op[0], grads, *through_op[1:], **named)
    assert_equal_states(through_op, run(kernel8(LIBRARY, 256, True), state, [grads]))
    values, key = normal(1000, 1, torch.float32), random_key(0, 0, scalar(1))
    codes, absmax = blockwise8.quantize_blockwise(values, "m", key=key)
    assert_equal_bits([codes, absmax], blockwise8_kernel.quantize(LIBRARY, values, True, 256, key))
    weight, left, right = torch.zeros(8, 4), torch.ones(1, 8), torch.ones(1, 4)
    fold.fold_(weight, left, right, decay=scalar(1.0, torch.float32), key=random_key(0, 0, scalar(1)))
    assert torch.equal(weight, torch.ones(8, 4))
    assert torch.equal(grad_norm.grad_norm(grads), grad_norm_kernel.grad_norm(LIBRARY, grads, True))


@needs_library
def test_a_tensor_that_raw_pointers_cannot_describe_is_refused_before_the_kernel() -> None:
    assert LIBRARY is not None
    weights, m_codes, m_absmax, *v = state8([512, 512], [torch.float32])
    wrong = (weights, m_codes, [m_absmax[0], m_absmax[1].double()], *v)
    with pytest.raises(InputError, match=r"m_absmax is torch\.float64; contiguous float32 is wanted"):
        kernel8(LIBRARY, 256, True)(wrong, gradients([512, 512], DTYPES, 1), arrays(2, 1))
    strided = [torch.zeros(1024)[::2], torch.zeros(512)]
    with pytest.raises(InputError, match=r"a gradient is torch\.float32, not contiguous"):
        kernel8(LIBRARY, 256, True)((weights, m_codes, m_absmax, *v), strided, arrays(2, 1))


def test_info_names_the_kernel_that_the_dispatcher_really_has() -> None:
    rows = {row.op: row for row in kernels_in_use() if row.device == "cpu"}
    for op in (*KERNEL_OPS, *CPU_OPS):
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"lisa_kernels::{op}", "CPU")
        assert rows[op].kernel.startswith("C++") == registered
        assert ("C++" in rows[op].why_not_others) == (not registered)
