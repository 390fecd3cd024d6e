"""The compiled kernels of weights at rest give the definition's bits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lisa_kernels.ops.resting import GROUP, KINDS, code_count, quantize_resting, reference, scale_count

from .kernel_checks import BF16, EXTREMES, FP16, FP32, assert_equal_bits, elements_of, normal
from .kernel_runs import MACHINES, Machine, Poisoned, edited_kernels

SIZES = (1, 63, 64, 65, 2048, 4097)
OF_KIND = pytest.mark.parametrize("kind", KINDS)
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["float32", "bfloat16", "float16"])


@pytest.fixture(params=MACHINES, ids=str)
def machine(request: pytest.FixtureRequest) -> Machine:
    """An emulated capability, and the GPU where there is one."""
    found: Machine = request.param
    return found


def defined(values: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and the weights that these stand for."""
    if kind == "int8":
        codes, scales = reference.quantize_int8(values)
        return codes, scales, reference.dequantize_int8(codes, scales, values.numel()).to(values.dtype)
    codes, scales = reference.quantize_nf4(values)
    return codes, scales, reference.dequantize_nf4(codes, scales, values.numel()).to(values.dtype)


def check(machine: Machine, values: Tensor, kind: str, shift: int = 0, lost: slice = slice(0, 0)) -> None:
    """Fail unless a machine gives what is defined; in the group `lost` this is NaN, whatever the codes."""
    memory, aligned, kernels = Poisoned(machine.device, shift), Poisoned(machine.device), machine.module("resting")
    expected = defined(values, kind)
    [there] = memory.place([values])
    codes, scales, decoded = memory.empty(expected[0]), aligned.empty(expected[1]), memory.empty(expected[2])
    machine.run(
        [
            kernels.quantize_launch(there, codes, scales, kind, machine.warp),
            kernels.dequantize_launch(codes, scales, decoded, kind, machine.warp),
        ]
    )
    of_codes = slice(code_count(lost.start, kind), code_count(lost.stop, kind))
    for given in ((codes, decoded), (expected[0], expected[2])):
        assert given[1][lost].isnan().all()
        given[0][of_codes], given[1][lost] = 0, 0
    for ours, wanted, what in zip((codes, scales, decoded), expected, ("codes", "scales", "weights")):
        assert_equal_bits(ours, wanted, what)
    memory.assert_untouched()
    aligned.assert_untouched()


@OF_KIND
@DTYPES
@pytest.mark.parametrize("n", SIZES)
def test_kernels_equal_the_definition_at_every_size(machine: Machine, n: int, dtype: torch.dtype, kind: str) -> None:
    check(machine, normal(n, n, dtype), kind)


@OF_KIND
def test_kernels_take_views_that_begin_anywhere(machine: Machine, kind: str) -> None:
    check(machine, normal(4096, 1, BF16), kind, shift=1)


@OF_KIND
@pytest.mark.parametrize("extreme", EXTREMES)
def test_kernels_equal_the_definition_on_extreme_values(machine: Machine, extreme: str, kind: str) -> None:
    check(machine, EXTREMES[extreme], kind)


def with_a(bad: float, dtype: torch.dtype = FP32) -> Tensor:
    """Three groups, in the second of which a value is not finite."""
    values = normal(3 * GROUP, 3, dtype)
    values[GROUP + 700] = bad
    return values


SECOND_GROUP = slice(GROUP, 2 * GROUP)


@OF_KIND
@DTYPES
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf], ids=["nan", "-nan", "inf", "-inf"])
def test_a_single_nan_or_infinity_is_seen(machine: Machine, bad: float, dtype: torch.dtype, kind: str) -> None:
    """By the scales, which say so of a whole weight, and in its own group alone."""
    check(machine, with_a(bad, dtype), kind, lost=SECOND_GROUP)


@OF_KIND
def test_every_code_means_what_the_definition_says(machine: Machine, kind: str) -> None:
    """Each byte at each place of a block, as three dtypes have it."""
    for dtype in (FP32, BF16, FP16):
        codes = torch.arange(256).to(torch.uint8)
        n = 256 if kind == "int8" else 512
        scales = quantize_resting(normal(n, 2), kind)[1]
        decode = reference.dequantize_int8 if kind == "int8" else reference.dequantize_nf4
        memory, kernels = Poisoned(machine.device), machine.module("resting")
        [there], [scale] = memory.place([codes]), memory.place([scales])
        values = memory.empty(torch.zeros(n, dtype=dtype))
        machine.run([kernels.dequantize_launch(there, scale, values, kind, machine.warp)])
        assert_equal_bits(values, decode(codes, scales, n).to(dtype), "weights")


@OF_KIND
def test_errors_of_approximate_instructions_do_not_reach_codes(kind: str) -> None:
    check(Machine(90, fuzz=2), normal(4096, 1), kind)


@OF_KIND
def test_kernels_work_far_into_a_tensor(kind: str) -> None:
    """Only the programs around element 2³² run, on pointers that lie that far before what is there."""
    machine, n, start = Machine(90), 8192, 2**32 - 4096
    kernels, values = machine.module("resting"), normal(n, 1, BF16)
    expected = defined(values, kind)
    codes, scales, decoded = (torch.empty_like(tensor) for tensor in expected)
    before = {"codes": code_count(start, kind), "scales": scale_count(start), "values": 2 * start}
    for launch in (
        kernels.quantize_launch(values, codes, scales, kind),
        kernels.dequantize_launch(codes, scales, decoded, kind),
    ):
        first = start // elements_of(launch)
        launch = replace(launch, arguments={**launch.arguments, "count": start + n})
        machine.run([launch], displaced=before, only=range(first, first + launch.programs))
    for ours, wanted, what in zip((codes, scales, decoded), expected, ("codes", "scales", "weights")):
        assert_equal_bits(ours, wanted, what)


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("(first << 4) | second", "(second << 4) | first", "nf4"),
        ("first = scaled > ", "first = scaled >= ", "nf4"),
        ("1.5 * 2.0**23", "1.5 * 2.0**23 + 1", "int8"),
        ("0.007874015718698502", "0.007874017", "int8"),
        ("tl.where(first, LEVEL[13], LEVEL[12])", "tl.where(first, LEVEL[12], LEVEL[13])", "nf4"),
        ("(bits - low + size // 2)", "(bits - low)", "nf4"),
        ("(ALL_STEPS - 1)) // ALL_STEPS", "(ALL_STEPS - 1)) // ALL_STEPS + 1", "int8"),
        ("bits, LARGEST_INT)", "bits, bits)", "nf4"),
        ("tl.minimum(tl.maximum(scaled, -127.0), 127.0)", "scaled", "int8"),
    ],
    ids=[
        "halves swapped",
        "ties up",
        "rounding",
        "scale",
        "levels swapped",
        "places down",
        "steps",
        "an absent block",
        "more than 127",
    ],
)
def test_a_defect_in_a_kernel_is_found(
    old: str, new: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = edited_kernels("resting", old, new, tmp_path, monkeypatch)
    ties = torch.tensor([*reference.MIDDLES, 1.0]).repeat(64)
    with pytest.raises(AssertionError, match="differ in their bits"):
        check(machine, torch.cat([normal(4096, 1), ties]), kind)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("larger(largest, tl.abs(x))", "tl.maximum(largest, tl.abs(x))"),
        ("tl.reduce(tl.reduce(magnitude, 2, larger), 1, larger)", "tl.max(tl.max(magnitude, axis=2), axis=1)"),
        ("larger(largest, SMALLEST)", "tl.maximum(largest, SMALLEST)"),
        ("tl.where(high < INFINITY, low | step, NAN)", "low | step"),
    ],
    ids=["dropped by the largest of two", "dropped among neighbours", "dropped by the smallest there is", "not said"],
)
def test_a_kernel_that_drops_a_nan_is_found(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = edited_kernels("resting", old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check(machine, with_a(math.nan), "nf4", lost=SECOND_GROUP)
