"""The C++ kernels equal the references bit for bit, on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias, TypeVar, cast

import pytest
import torch
from torch import Tensor

from lisa_kernels import native
from lisa_kernels.errors import InputError
from lisa_kernels.native import DTYPE_CODES, Stream
from lisa_kernels.ops import adamw8, blockwise8, fold
from lisa_kernels.ops.adamw8 import Hyper
from lisa_kernels.ops.adamw8 import cpu_kernel as adamw8_kernel
from lisa_kernels.ops.adamw8 import reference as adamw8_reference
from lisa_kernels.ops.blockwise8 import cpu_kernel as blockwise8_kernel
from lisa_kernels.ops.blockwise8 import reference as blockwise8_reference
from lisa_kernels.ops.dispatch import CPU_OPS, kernels_in_use
from lisa_kernels.ops.fold import cpu_kernel as fold_kernel
from lisa_kernels.ops.fold import reference as fold_reference
from lisa_kernels.ops.random_bits import random_key, random_words, round_to_bfloat16, weight_bits

LIBRARY = native.load()
needs_library = pytest.mark.skipif(LIBRARY is None, reason=native.why_absent())

SIZES = (0, 1, 255, 256, 257, 4097, 70000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HYPER = Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2)
ROUNDINGS = pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
STEPS = 3

# Weight, then m and v: codes and absmax each, or float32.
State8: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
State32: TypeAlias = tuple[Tensor, Tensor, Tensor]
State = TypeVar("State", State8, State32)


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
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


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
    "1e30": lambda n: normal(n, 5, torch.float32) * 1e30,
    "zeros": lambda n: torch.zeros(n),
    "minus-zeros": lambda n: -torch.zeros(n),
    "one-nonzero": one_nonzero,
    "all-scales": lambda n: 10 ** (torch.linspace(-44, 38, n)),
}


def codes_and_absmax(n: int, block_size: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(n, dtype=torch.uint8), torch.zeros(-(-n // block_size))


def state8(n: int, block_size: int, weight: torch.dtype) -> State8:
    return (normal(n, 1, weight), *codes_and_absmax(n, block_size), *codes_and_absmax(n, block_size))


def state32(n: int, weight: torch.dtype) -> State32:
    return normal(n, 1, weight), torch.zeros(n), torch.zeros(n)


def copies(state: State) -> State:
    return cast(State, tuple(tensor.clone() for tensor in state))


def clocks(step: int, skip: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return scalar(step), scalar(step + 7), scalar(skip, torch.bool), scalar(0.7, torch.float32)


def run_adamw8(
    library: native.Library, state: State8, grads: list[Tensor], block_size: int, stochastic: bool, seed: int = 3
) -> None:
    for step, grad in enumerate(grads, start=1):
        adamw8_kernel.adamw8_(
            library, state[0], grad, *state[1:], *clocks(step), *HYPER, block_size, stochastic, seed, 11
        )


def run_adamw8_reference(state: State8, grads: list[Tensor], block_size: int, stochastic: bool) -> None:
    for step, grad in enumerate(grads, start=1):
        adamw8_reference.adamw8_(state[0], grad, *state[1:], *clocks(step), HYPER, block_size, stochastic, 3, 11)


def check_adamw8(
    library: native.Library, state: State8, grads: list[Tensor], block_size: int, stochastic: bool
) -> None:
    ours, reference = copies(state), copies(state)
    run_adamw8(library, ours, grads, block_size, stochastic)
    run_adamw8_reference(reference, grads, block_size, stochastic)
    assert_equal_bits(ours, reference)


def gradients(n: int, dtype: torch.dtype) -> list[Tensor]:
    return [normal(n, 20 + step, dtype) for step in range(STEPS)]


@needs_library
@ROUNDINGS
@pytest.mark.parametrize("block_size", [64, 256, 2048])
@pytest.mark.parametrize("n", SIZES)
def test_three_steps_of_adamw8_equal_the_reference_at_every_size(
    library: native.Library, n: int, block_size: int, stochastic: bool
) -> None:
    check_adamw8(library, state8(n, block_size, torch.bfloat16), gradients(n, torch.float32), block_size, stochastic)


@needs_library
@ROUNDINGS
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_adamw8_and_adamw32_equal_the_reference_for_every_pair_of_dtypes(
    library: native.Library, weight_dtype: torch.dtype, grad_dtype: torch.dtype, stochastic: bool
) -> None:
    grads = gradients(4097, grad_dtype)
    check_adamw8(library, state8(4097, 256, weight_dtype), grads, 256, stochastic)
    ours, reference = state32(4097, weight_dtype), state32(4097, weight_dtype)
    for step, grad in enumerate(grads, start=1):
        adamw8_kernel.adamw32_(library, ours[0], grad, *ours[1:], *clocks(step), *HYPER, stochastic, 3, 11)
        adamw8_reference.adamw32_(reference[0], grad, *reference[1:], *clocks(step), HYPER, stochastic, 3, 11)
    assert_equal_bits(ours, reference)


@needs_library
@ROUNDINGS
@pytest.mark.parametrize("n", SIZES)
def test_adamw32_equals_the_reference_at_every_size(library: native.Library, n: int, stochastic: bool) -> None:
    ours, reference = state32(n, torch.bfloat16), state32(n, torch.bfloat16)
    grad = normal(n, 2, torch.bfloat16)
    adamw8_kernel.adamw32_(library, ours[0], grad, *ours[1:], *clocks(1), *HYPER, stochastic, 3, 11)
    adamw8_reference.adamw32_(reference[0], grad, *reference[1:], *clocks(1), HYPER, stochastic, 3, 11)
    assert_equal_bits(ours, reference)


@needs_library
@ROUNDINGS
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_adamw8_equals_the_reference_on_extreme_gradients(
    library: native.Library, extreme: str, weight_dtype: torch.dtype, stochastic: bool
) -> None:
    check_adamw8(library, state8(1000, 256, weight_dtype), [EXTREMES[extreme](1000)] * STEPS, 256, stochastic)


@needs_library
@pytest.mark.usefixtures("two_threads")
def test_one_thread_and_two_give_the_same_bits() -> None:
    assert LIBRARY is not None
    grads = gradients(70000, torch.bfloat16)
    one, two = state8(70000, 256, torch.bfloat16), state8(70000, 256, torch.bfloat16)
    run_adamw8(LIBRARY, two, grads, 256, True)
    torch.set_num_threads(1)
    run_adamw8(LIBRARY, one, grads, 256, True)
    assert_equal_bits(one, two)


@needs_library
def test_another_seed_gives_other_codes_and_the_comparison_sees_it() -> None:
    """Negative control of every equality above."""
    assert LIBRARY is not None
    ours, reference = state8(4097, 256, torch.bfloat16), state8(4097, 256, torch.bfloat16)
    run_adamw8(LIBRARY, ours, gradients(4097, torch.float32), 256, True, seed=4)
    run_adamw8_reference(reference, gradients(4097, torch.float32), 256, True)
    with pytest.raises(AssertionError, match="differ in their bits"):
        assert_equal_bits(ours, reference)


@needs_library
def test_a_skipped_step_touches_nothing() -> None:
    assert LIBRARY is not None
    grad, before8, before32 = (
        normal(300, 2, torch.float32),
        state8(300, 256, torch.bfloat16),
        state32(300, torch.bfloat16),
    )
    after8, after32 = copies(before8), copies(before32)
    adamw8_kernel.adamw8_(LIBRARY, after8[0], grad, *after8[1:], *clocks(1, skip=True), *HYPER, 256, True, 3, 11)
    adamw8_kernel.adamw32_(LIBRARY, after32[0], grad, *after32[1:], *clocks(1, skip=True), *HYPER, True, 3, 11)
    assert_equal_bits(after8, before8)
    assert_equal_bits(after32, before32)


@needs_library
@ROUNDINGS
@pytest.mark.parametrize("signed", [True, False], ids=["m", "v"])
@pytest.mark.parametrize("n", SIZES)
def test_the_codec_equals_the_reference_at_every_size_and_block_size(
    library: native.Library, n: int, signed: bool, stochastic: bool
) -> None:
    values = normal(n, 1, torch.float32) if signed else normal(n, 1, torch.float32).abs()
    key = random_key(3, 11, scalar(8))
    random20 = random_words(key, 0, n)[0 if signed else 1] >> 12 if stochastic else None
    for block_size in (16, 64, 256, 2048, 65536):
        ours = blockwise8_kernel.quantize(library, values, signed, block_size, key if stochastic else None)
        assert_equal_bits(ours, blockwise8_reference.quantize(values, signed, block_size, random20))
        decoded = blockwise8_kernel.dequantize(library, *ours, signed, block_size)
        assert_equal_bits([decoded], [blockwise8_reference.dequantize(*ours, signed, block_size)])


@needs_library
@pytest.mark.parametrize("signed", [True, False], ids=["m", "v"])
def test_every_code_decodes_as_the_reference_decodes_it_even_at_an_infinite_scale(
    library: native.Library, signed: bool
) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for absmax in (0.0, 2.0**-120, 1.0, 3e38, float("inf")):
        arguments = (codes, torch.tensor([absmax]), signed, 256)
        ours, reference = blockwise8_kernel.dequantize(library, *arguments), blockwise8_reference.dequantize(*arguments)
        assert_equal_bits([ours], [reference])


@needs_library
@ROUNDINGS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (257, 33), (300, 5000)], ids=str)
def test_fold_equals_the_reference_within_a_band_and_across_bands(
    library: native.Library, shape: tuple[int, int], dtype: torch.dtype, stochastic: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(4, shape[0], generator=generator), torch.randn(4, shape[1], generator=generator).to(dtype)
    weight = torch.randn(shape, generator=generator).to(dtype)
    ours, reference = weight.clone(), weight.clone()
    arguments = (left, right, scalar(0.999, torch.float32), scalar(5), stochastic, 3, 11)
    fold_kernel.fold_(library, ours, *arguments)
    fold_reference.fold_(reference, *arguments)
    assert_equal_bits([ours], [reference])


@needs_library
def test_fold_keeps_its_random_numbers_beyond_two_to_the_32_elements(library: native.Library) -> None:
    start, n = 2**32 - 700, 3000
    weight, update = normal(n, 1, torch.bfloat16), normal(n, 2, torch.float32)
    words = random_words(random_key(3, 11, scalar(5)), start, n)
    expected = round_to_bfloat16(weight.float() * 0.5 + update, weight_bits(*words))
    library.call(
        "fold", weight.data_ptr(), update.data_ptr(), n, start, 0.5, Stream(3, 11, 5), DTYPE_CODES[torch.bfloat16], True
    )
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
    library.call(
        "fold",
        weights.data_ptr(),
        update.data_ptr(),
        update.numel(),
        0,
        1.0,
        Stream(0, 0, 0),
        DTYPE_CODES[dtype],
        False,
    )
    number = ~expected.isnan()
    assert torch.equal(weights.isnan(), ~number)
    assert_equal_bits([weights[number]], [expected[number]])


@needs_library
def test_the_ops_run_the_kernels_on_cpu_tensors() -> None:
    assert LIBRARY is not None
    ours, through_op = state8(1000, 256, torch.bfloat16), state8(1000, 256, torch.bfloat16)
    grad = normal(1000, 2, torch.float32)
    step, clock, skip, grad_scale = clocks(1)
    run_adamw8(LIBRARY, ours, [grad], 256, True)
    adamw8.adamw8_(
        through_op[0], grad, *through_op[1:], step=step, clock=clock, skip=skip, grad_scale=grad_scale,
        hyper=HYPER, seed=3, parameter=11,
    )  # fmt: skip
    assert_equal_bits(through_op, ours)
    values, key = normal(1000, 1, torch.float32), random_key(0, 0, scalar(1))
    codes, absmax = blockwise8.quantize_blockwise(values, "m", key=key)
    assert_equal_bits([codes, absmax], blockwise8_kernel.quantize(LIBRARY, values, True, 256, key))
    weight, left, right = torch.zeros(8, 4), torch.ones(1, 8), torch.ones(1, 4)
    fold.fold_(weight, left, right, decay=scalar(1.0, torch.float32), clock=scalar(1))
    assert torch.equal(weight, torch.ones(8, 4))


@needs_library
def test_a_tensor_that_raw_pointers_cannot_describe_is_refused_before_the_kernel() -> None:
    assert LIBRARY is not None
    weight, m_codes, m_absmax, v_codes, v_absmax = state8(512, 256, torch.float32)
    with pytest.raises(InputError, match=r"m_absmax is torch\.float64"):
        run_adamw8(LIBRARY, (weight, m_codes, m_absmax.double(), v_codes, v_absmax), [torch.zeros(512)], 256, True)


def test_info_names_the_kernel_that_the_dispatcher_really_has() -> None:
    rows = {row.op: row for row in kernels_in_use() if row.device == "cpu"}
    for op in CPU_OPS:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"lisa_kernels::{op}", "CPU")
        assert rows[op].kernel.startswith("C++") == registered
        assert bool(rows[op].why_not_others) == (not registered)
