"""The 8-bit codec is the small-float format that its docstring says, with rounding that is fair."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tolerances import CODEC_NEAREST, CODEC_SCALING, CODEC_STOCHASTIC, STANDARD_ERRORS
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops.blockwise8 import dequantize_blockwise, quantize_blockwise, reference
from lisa_kernels.ops.blockwise8.reference import TOP
from lisa_kernels.ops.random_bits import random_key

SIZES = [0, 1, 255, 256, 257, 4097]
KINDS = ["m", "v"]
TOP_CODE = {"m": 127, "v": 255}
# Binades below the top: magnitudes smaller than the code 1 of the kind have no code of their own.
SMALLEST_EXPONENT = {"m": -16, "v": -32}

both_kinds = pytest.mark.parametrize("kind", KINDS)
both_roundings = pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])


def key_for(stochastic: bool, device: torch.device | None = None, clock: int = 1) -> Tensor | None:
    return random_key(3, 0, torch.tensor(clock, device=device)) if stochastic else None


def moments(count: int, kind: str, device: torch.device | str = "cpu", decades: float = 3.0) -> Tensor:
    """Return float32 [count] of magnitudes spread over `decades`, with signs for kind m."""
    generator = torch.Generator().manual_seed(count)
    magnitude = 10.0 ** (torch.rand(count, generator=generator) * decades - decades)
    sign = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0) if kind == "m" else 1.0
    return (magnitude * sign).to(device)


def decoded_by_formula(kind: str, code: int, absmax: float) -> float:
    """Return the value of a code by the closed formula, in float64."""
    magnitude = code & 127 if kind == "m" else code
    if magnitude == 0:
        return 0.0
    value = 2.0 ** ((magnitude >> 3) + SMALLEST_EXPONENT[kind]) * (1 + (magnitude & 7) / 8) * absmax / TOP
    return -value if kind == "m" and code > 127 else value


def all_codes(kind: str, absmax: float) -> Tensor:
    codes = torch.arange(256, dtype=torch.uint8)
    return dequantize_blockwise(codes, torch.tensor([absmax]), kind)


@both_kinds
def test_every_code_decodes_by_the_closed_formula(kind: str, device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    decoded = dequantize_blockwise(codes, torch.tensor([0.9375], device=device), kind)
    wanted = [decoded_by_formula(kind, code, 0.9375) for code in range(256)]
    assert decoded.tolist() == pytest.approx(wanted, rel=CODEC_SCALING, abs=0)


@both_kinds
def test_magnitudes_grow_with_their_codes(kind: str) -> None:
    values = all_codes(kind, 1.0)[: TOP_CODE[kind] + 1]
    assert bool((values.diff() > 0).all())


@both_kinds
@both_roundings
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 3.7e5, 1e30], ids=str)
def test_the_absmax_is_the_top_code(kind: str, stochastic: bool, scale: float, device: torch.device) -> None:
    values = moments(64 * 256, kind, device) * scale
    codes, absmax = quantize_blockwise(values, kind, key=key_for(stochastic, device))
    blocks = values.view(-1, 256)
    largest = blocks.abs().argmax(dim=1, keepdim=True)
    assert torch.equal(absmax, blocks.abs().amax(dim=1))
    top = codes.view(-1, 256).gather(1, largest)
    negative = blocks.gather(1, largest) < 0
    assert torch.equal(top.int(), TOP_CODE[kind] + 128 * negative.int())


@both_kinds
@pytest.mark.parametrize("absmax", [1e-30, 0.9375, 1.0, 0.3, 1e-3, 1e30], ids=str)
def test_every_code_survives_a_round_trip_to_nearest(kind: str, absmax: float, device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    values = dequantize_blockwise(codes, torch.tensor([absmax], device=device), kind)
    again, absmax_again = quantize_blockwise(values, kind)
    assert torch.equal(again, codes)
    assert float(absmax_again) == pytest.approx(absmax, rel=CODEC_SCALING)


@both_kinds
@both_roundings
@pytest.mark.parametrize("count", SIZES, ids=str)
def test_values_come_back_within_a_step_at_awkward_sizes(
    kind: str, stochastic: bool, count: int, device: torch.device
) -> None:
    values = moments(count, kind, device)
    codes, absmax = quantize_blockwise(values, kind, key=key_for(stochastic, device))
    assert codes.dtype == torch.uint8
    assert codes.shape == (count,)
    assert absmax.dtype == torch.float32
    assert absmax.shape == (-(-count // 256),)
    back = dequantize_blockwise(codes, absmax, kind)
    bound = CODEC_STOCHASTIC if stochastic else CODEC_NEAREST
    assert bool(((back - values).abs() <= (bound + CODEC_SCALING) * values.abs()).all())


@both_kinds
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.7, 0.9], ids=str)
def test_stochastic_rounding_is_unbiased_over_keys(kind: str, fraction: float) -> None:
    """Every value lies `fraction` of the way between two codes; nearest, the negative control, is biased by it."""
    table = all_codes(kind, 1.0)[1 : TOP_CODE[kind] + 1]
    low, high = table[:-1], table[1:]
    values = torch.cat([low + fraction * (high - low), table[-1:]])

    def mean_error(key: Tensor | None) -> float:
        codes, absmax = quantize_blockwise(values, kind, key=key)
        back = dequantize_blockwise(codes, absmax, kind)
        return float(((back - values)[:-1].double() / (high - low).double()).mean())

    rounds = 200
    mean = sum(mean_error(key_for(True, clock=clock)) for clock in range(rounds)) / rounds
    standard_error = math.sqrt(fraction * (1 - fraction) / (rounds * low.numel()))
    assert abs(mean) <= STANDARD_ERRORS * standard_error
    assert abs(mean_error(None)) > STANDARD_ERRORS * standard_error


@both_roundings
@pytest.mark.parametrize("largest", [1.0, 1e-38, 1e30], ids=str)
def test_a_positive_second_moment_is_never_code_0(stochastic: bool, largest: float, device: torch.device) -> None:
    """First moments of the same values, the negative control, do reach code 0."""
    values = (torch.logspace(-44, 0, 256) * largest).to(device)
    values[0] = 1e-45
    values[-1] = largest
    positive = values > 0
    v_codes, _ = quantize_blockwise(values, "v", key=key_for(stochastic, device))
    assert bool((v_codes[positive] > 0).all())
    assert bool((v_codes[~positive] == 0).all())
    if largest != 1e-38:
        m_codes, _ = quantize_blockwise(values, "m", key=key_for(stochastic, device))
        assert bool((m_codes[positive] == 0).any())


@both_kinds
@both_roundings
def test_zero_blocks_stay_zero_beside_others(kind: str, stochastic: bool, device: torch.device) -> None:
    values = moments(3 * 256, kind, device)
    values[256:512] = 0.0
    codes, absmax = quantize_blockwise(values, kind, key=key_for(stochastic, device))
    assert int(codes[256:512].sum()) == 0
    assert bool(torch.isfinite(absmax).all())
    back = dequantize_blockwise(codes, absmax, kind)
    assert torch.equal(back[256:512], torch.zeros(256, device=device))
    assert bool((back[:256] != 0).all())


@both_kinds
def test_a_fresh_state_of_zeros_decodes_to_zeros(kind: str) -> None:
    back = dequantize_blockwise(torch.zeros(300, dtype=torch.uint8), torch.zeros(2), kind)
    assert torch.equal(back, torch.zeros(300))


@both_kinds
@both_roundings
@pytest.mark.parametrize("scale", [1e-40, 1e-37, 1e30], ids=str)
def test_extreme_magnitudes_stay_finite_and_near(kind: str, stochastic: bool, scale: float) -> None:
    values = moments(256, kind, decades=1.0) * scale
    codes, absmax = quantize_blockwise(values, kind, key=key_for(stochastic))
    back = dequantize_blockwise(codes, absmax, kind)
    # Blocks below the smallest scale keep it: values under its code 1 vanish.
    smallest = decoded_by_formula(kind, 1, reference.SMALLEST_ABSMAX) + 2.0**-149
    bound = (CODEC_STOCHASTIC + CODEC_SCALING) * values.abs() + smallest
    assert bool(((back - values).abs() <= bound).all())
    assert bool((back[values.abs() > smallest] != 0).all())


@both_kinds
@pytest.mark.parametrize("block_size", [16, 64, 256, 2048, 65536], ids=str)
def test_a_block_depends_on_its_own_values_only(kind: str, block_size: int) -> None:
    values = moments(block_size * 2 + block_size // 2, kind)
    codes, absmax = quantize_blockwise(values, kind, block_size)
    for index, block in enumerate(values.split(block_size)):
        alone, absmax_alone = quantize_blockwise(block.contiguous(), kind, block_size)
        assert torch.equal(codes[index * block_size : (index + 1) * block_size], alone)
        assert torch.equal(absmax[index : index + 1], absmax_alone)
    back = dequantize_blockwise(codes, absmax, kind, block_size)
    assert bool(((back - values).abs() <= (CODEC_NEAREST + CODEC_SCALING) * values.abs()).all())


@both_kinds
def test_the_same_key_gives_the_same_codes_and_another_key_others(kind: str) -> None:
    values = moments(4097, kind)
    one, two, other = (quantize_blockwise(values, kind, key=key_for(True, clock=clock))[0] for clock in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@both_kinds
@pytest.mark.parametrize("count", SIZES, ids=str)
def test_the_operation_equals_its_definition(kind: str, count: int) -> None:
    values = moments(count, kind)
    codes, absmax = quantize_blockwise(values, kind)
    wanted_codes, wanted_absmax = reference.quantize(values, kind == "m", 256, None)
    assert torch.equal(codes, wanted_codes)
    assert torch.equal(absmax, wanted_absmax)
    back = dequantize_blockwise(codes, absmax, kind)
    assert torch.equal(back, reference.dequantize(codes, absmax, kind == "m", 256))


@pytest.mark.parametrize("count", [0, 1, 257, 4096], ids=str)
@pytest.mark.parametrize("signed", [True, False], ids=KINDS)
def test_the_operations_pass_torchs_own_checks(count: int, signed: bool) -> None:
    values = moments(count, "m" if signed else "v")
    ops = torch.ops.lisa_kernels
    for key in (None, key_for(True)):
        torch.library.opcheck(ops.quantize_blockwise, (values, signed, 256, key))
    codes, absmax = ops.quantize_blockwise(values, signed, 256, None)
    torch.library.opcheck(ops.dequantize_blockwise, (codes, absmax, signed, 256))


def call_quantize(**changed: Any) -> None:
    quantize_blockwise(**{"values": torch.ones(300), "kind": "m", "block_size": 256, **changed})


def call_dequantize(**changed: Any) -> None:
    given = {"codes": torch.zeros(300, dtype=torch.uint8), "absmax": torch.ones(2), "kind": "v", "block_size": 256}
    dequantize_blockwise(**{**given, **changed})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        pytest.param({"kind": "first"}, "'first'.*'m'", id="kind"),
        pytest.param({"block_size": 100}, "100.*power of two", id="no-power-of-two"),
        pytest.param({"block_size": 8}, "8.*16", id="block-too-small"),
        pytest.param({"block_size": 1 << 17}, "131072.*65536", id="block-too-large"),
        pytest.param({"block_size": -256}, "-256", id="block-negative"),
        pytest.param({"values": torch.ones(300, dtype=torch.bfloat16)}, "bfloat16.*float32", id="dtype"),
        pytest.param({"values": torch.ones(3, 100)}, r"\[3, 100\].*\[n\]", id="two-dimensional"),
        pytest.param({"values": torch.ones(600)[::2]}, "contiguous", id="strided"),
    ],
)
def test_quantize_refuses_what_it_cannot_encode(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call_quantize(**changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        pytest.param({"kind": "w"}, "'w'", id="kind"),
        pytest.param({"block_size": 0}, "0.*power of two", id="block-size"),
        pytest.param({"codes": torch.zeros(300, dtype=torch.int8)}, "int8.*uint8", id="dtype"),
        pytest.param({"absmax": torch.ones(3)}, r"\[3\].*\[2\]", id="block-count"),
        pytest.param({"block_size": 512}, r"512 need \[1\]", id="other-block-size"),
    ],
)
def test_dequantize_refuses_what_it_cannot_decode(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call_dequantize(**changed)
