"""The compiled kernels of the codec and the gradients' norm give the definition's bits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lisa_kernels.ops.blockwise8 import reference
from lisa_kernels.ops.random_bits import key_base, keys_at, moment_bits, random_words

from .kernel_checks import (
    BF16,
    EXTREMES,
    FP16,
    FP32,
    assert_equal_bits,
    check_codec,
    check_norm,
    check_reciprocal,
    elements_of,
    normal,
)
from .kernel_runs import MACHINES, Machine, Poisoned

SIZES = (1, 255, 256, 257, 2048, 4097)
KINDS = pytest.mark.parametrize("signed", [True, False], ids=["m", "v"])
KEY = keys_at(torch.tensor([key_base(3, 2)]), torch.tensor(8))[0]


@pytest.fixture(params=MACHINES, ids=str)
def machine(request: pytest.FixtureRequest) -> Machine:
    """An emulated capability, and the GPU where there is one."""
    found: Machine = request.param
    return found


def of_kind(values: Tensor, signed: bool) -> Tensor:
    """Second moments are not negative."""
    return values if signed else values.abs()


@pytest.mark.parametrize("name", ["TOP", "INVERSE_TOP", "SMALLEST_ABSMAX", "SMALLEST_M"])
def test_constants_are_the_definitions(name: str) -> None:
    """A place more or less in one of them moves a code in a million."""
    assert getattr(Machine(90).module("blockwise8"), name).value == getattr(reference, name)


@KINDS
@pytest.mark.parametrize("key", [KEY, None], ids=["stochastic", "nearest"])
@pytest.mark.parametrize("n", SIZES)
def test_the_codec_equals_the_definition_at_every_size(
    machine: Machine, n: int, key: Tensor | None, signed: bool
) -> None:
    check_codec(machine, of_kind(normal(n, n), signed), signed, 256, key)


@KINDS
@pytest.mark.parametrize("block_size", [16, 8192])
def test_the_codec_equals_the_definition_for_other_blocks(machine: Machine, block_size: int, signed: bool) -> None:
    check_codec(machine, of_kind(normal(block_size + 1000, 1), signed), signed, block_size, KEY)


@KINDS
def test_the_codec_takes_views_that_begin_anywhere(machine: Machine, signed: bool) -> None:
    check_codec(machine, of_kind(normal(4096, 1), signed), signed, 256, KEY, shift=1)


@KINDS
@pytest.mark.parametrize("extreme", EXTREMES)
def test_the_codec_equals_the_definition_on_extreme_values(machine: Machine, extreme: str, signed: bool) -> None:
    values = EXTREMES[extreme]
    check_codec(machine, values if extreme == "minus zeros" else of_kind(values, signed), signed, 256, None)


@KINDS
def test_errors_of_approximate_instructions_do_not_reach_codes(signed: bool) -> None:
    """The reciprocal of a block's absmax starts from an approximate root and ends correctly rounded."""
    check_codec(Machine(90, fuzz=2), of_kind(normal(4096, 1), signed), signed, 16, KEY)


@KINDS
@pytest.mark.parametrize("absmax", [0.0, 2.0**-140, 2.0**-120, 1.0, 3e38], ids=str)
def test_every_code_decodes_as_the_definition_decodes_it(machine: Machine, absmax: float, signed: bool) -> None:
    codes, scale = torch.arange(256).to(torch.uint8), torch.tensor([absmax])
    memory, kernels = Poisoned(machine.device), machine.module("blockwise8")
    [there], [its_scale] = memory.place([codes]), memory.place([scale])
    values = memory.empty(torch.zeros(256))
    machine.run([kernels.dequantize_launch(there, its_scale, values, signed, 256, machine.warp)])
    assert_equal_bits(values, reference.dequantize(codes, scale, signed, 256), "values")


@KINDS
def test_the_codec_far_into_a_tensor(signed: bool) -> None:
    """Only the programs around element 2³² run, on pointers that lie that far before what is there."""
    machine, n, start, block_size = Machine(90), 8192, 2**32 - 4096, 256
    kernels, values = machine.module("blockwise8"), of_kind(normal(n, 1), signed)
    bits20 = moment_bits(random_words(KEY, start, n), signed)
    expected = reference.quantize(values, signed, block_size, bits20)
    codes, absmax, decoded = (torch.empty_like(tensor) for tensor in (*expected, values))
    before = {"values": 4 * start, "codes": start, "absmax": start // block_size * 4}
    for launch in (
        kernels.quantize_launch(values, codes, absmax, signed, block_size, KEY),
        kernels.dequantize_launch(codes, absmax, decoded, signed, block_size),
    ):
        first = start // elements_of(launch)
        launch = replace(launch, arguments={**launch.arguments, "count": start + n})
        machine.run([launch], displaced=before, only=range(first, first + launch.programs))
    assert_equal_bits(codes, expected[0], "codes")
    assert_equal_bits(absmax, expected[1], "absmax")
    assert_equal_bits(decoded, reference.dequantize(*expected, signed, block_size), "values")


def test_reciprocals_are_correctly_rounded(machine: Machine) -> None:
    """Whatever an approximate root errs by, at both ends of the range and next to powers of two."""
    check_reciprocal(machine, 1 << 14)
    check_reciprocal(Machine(90, fuzz=3), 1 << 18)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_reciprocal_of_every_mantissa_is_correctly_rounded(seed: int) -> None:
    """All 2²⁴ numbers of two neighbouring binades: what a root's error depends on."""
    for part in range(16):
        first = (127 << 23) + (part << 20)
        values = torch.arange(first, first + (1 << 20), dtype=torch.int32).view(FP32)
        check_reciprocal(Machine(90, fuzz=100 * seed + part), 0, values)


@pytest.mark.parametrize("squares", [True, False], ids=["squares", "largest"])
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
def test_gradients_are_measured_at_every_size(machine: Machine, squares: bool, shift: int) -> None:
    grads = [normal(n, n, dtype) for dtype in (FP32, BF16, FP16) for n in (*SIZES, 9000)]
    check_norm(machine, grads, squares, shift)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf], ids=["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["float32", "bfloat16", "float16"])
def test_a_single_nan_or_infinity_is_seen(machine: Machine, dtype: torch.dtype, bad: float) -> None:
    """Wherever it is: in a whole tile, at its last element, in an odd end."""
    for place in (0, 4095, 4096, 5000):
        grads = [torch.ones(100, dtype=dtype), normal(5001, 1, dtype)]
        grads[1][place] = bad
        check_norm(machine, grads)


def test_a_nan_outlasts_an_infinity(machine: Machine) -> None:
    check_norm(machine, [torch.tensor([1.0, math.nan, math.inf, 2.0] * 3)])


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 3e38], ids=str)
def test_squares_neither_overflow_nor_vanish(machine: Machine, scale: float) -> None:
    check_norm(machine, [normal(5000, 1).clamp(-1, 1) * scale])
