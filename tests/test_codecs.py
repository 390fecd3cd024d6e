"""The codecs that `bench.numerics` compares are what their names say: a comparison with a wrong peer proves nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import bitsandbytes
import pytest
import torch
from tolerances import CODEC_SCALING, STANDARD_ERRORS
from torch import Tensor

from bench.codecs import (
    CANDIDATES,
    CODECS,
    DYNAMIC_FAIR,
    DYNAMIC_NEAREST,
    DYNAMIC_NO_FLOOR,
    FLASHOPTIM,
    FLOAT32,
    OURS,
    OURS_NEAREST,
    Codec,
    CodeTable,
    Coding,
    small_floats,
    tapered,
)

TABLES = [
    pytest.param(coding, id=f"{codec.name}: {moment}")
    for codec in CODECS
    for moment, coding in (("m", codec.m), ("v", codec.v))
    if isinstance(coding, CodeTable)
]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


def uniform(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def moments(count: int, signed: bool, decades: float = 3.0) -> Tensor:
    """Return float32 [count] of magnitudes spread over `decades`."""
    generator = torch.Generator().manual_seed(2)
    magnitude = 10.0 ** (torch.rand(count, generator=generator) * decades - decades)
    return magnitude * torch.randn(count, generator=generator).sign() if signed else magnitude


def round_trip(coding: Coding, values: Tensor, numbers: Tensor) -> Tensor:
    return coding.dequantize(*coding.quantize(values, numbers))


@pytest.mark.parametrize("table", TABLES)
def test_a_table_has_256_rising_values_at_most_zero_and_the_absmax_among_them(table: CodeTable) -> None:
    assert len(table.values) <= 256
    assert bool((table.values.diff() > 0).all())
    assert float(table.values[-1]) == 1.0
    assert float(table.values[0]) >= -1.0
    assert bool((table.values == 0).any())
    assert bool((table.values[:-1] <= table.boundaries).all() & (table.boundaries <= table.values[1:]).all())


@every_codec
def test_codecs_state_their_bytes(codec: Codec) -> None:
    """Two codes and two scales: of 4 bytes per 256 or per 64, of 2 bytes per 32."""
    wanted = 8.0 if codec is FLOAT32 else 2.125 if "blocks of" in codec.name else 2 + 2 * 4 / 256
    assert codec.bytes_per_parameter == wanted


def test_no_two_codecs_have_one_name() -> None:
    assert len({codec.name for codec in CODECS}) == len(CODECS)


@every_codec
def test_zeros_stay_zero_and_first_moments_keep_their_sign(codec: Codec) -> None:
    nothing = torch.zeros(256)
    for coding in (codec.m, codec.v):
        assert torch.equal(round_trip(coding, nothing, uniform(256)), nothing)
    values = moments(4096, signed=True)
    assert bool((round_trip(codec.m, values, uniform(4096)) * values >= 0).all())


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2.0**-24], ids=["down", "half", "up"])
def test_values_of_a_table_come_back_as_they_are(table: CodeTable, number: float) -> None:
    """Whatever the random numbers: there is nothing to round."""
    whole = replace(table, block_size=256)
    values = torch.cat([table.values, torch.ones(256 - len(table.values))])
    assert torch.equal(round_trip(whole, values, torch.full((256,), number)), values)


@every_codec
def test_only_stochastic_codecs_are_right_in_the_mean(codec: Codec) -> None:
    """A value between two codes, rounded many times, in a block whose absmax is another's; nearest is off always."""
    for signed, coding in ((True, codec.m), (False, codec.v)):
        values = torch.full((256 * 64,), 0.0432)
        values[::16] = 1.0
        back = round_trip(coding, values, uniform(len(values)))
        errors = (back - values)[values != 1.0].double()
        bound = STANDARD_ERRORS * float(errors.std()) / math.sqrt(len(errors)) + CODEC_SCALING
        fair = codec is FLOAT32 or getattr(coding, "stochastic", False)
        assert (abs(float(errors.mean())) <= bound) == fair, f"signed: {signed}"


def test_tables_of_small_floats_are_the_codec_of_the_operations() -> None:
    """Ours adds the random bits to the magnitude, a table compares with them on the signed axis."""
    for signed, coding in ((True, OURS.m), (False, OURS.v)):
        table = replace(small_floats(4 if signed else 5, 3, signed), floor=not signed)
        values, numbers = moments(1 << 16, signed), uniform(1 << 16)
        ours, theirs = (
            round_trip(coding, values, numbers),
            round_trip(table, values, torch.where(values < 0, numbers, 1 - numbers)),
        )
        same = (ours - theirs).abs() <= 2 * CODEC_SCALING * values.abs()
        # The rest fell between the two roundings of scale and number.
        assert float(same.double().mean()) > 0.9999


def test_nearest_codes_of_the_dynamic_map_are_those_of_bitsandbytes() -> None:
    """Where its quantiser for CPUs is exact: far above the lowest codes."""
    for signed, coding in ((True, DYNAMIC_NEAREST.m), (False, DYNAMIC_NEAREST.v)):
        assert isinstance(coding, CodeTable)
        values = moments(4096, signed, decades=1.0)
        codes, state = bitsandbytes.functional.quantize_blockwise(
            values, code=bitsandbytes.functional.create_dynamic_map(signed=signed), blocksize=256
        )
        ours, scales = coding.quantize(values, uniform(4096))
        assert torch.equal(scales, state.absmax)
        # Beside a boundary its quantiser for CPUs may go either way.
        assert float((ours == codes).double().mean()) > 0.995
        assert bool(((ours - codes.long()).abs() <= 1).all())


def test_flashoptim_rounds_in_its_companded_domains() -> None:
    for signed, coding in ((True, FLASHOPTIM.m), (False, FLASHOPTIM.v)):
        values = moments(4096, signed)
        scaled = (values.view(-1, 32) / values.view(-1, 32).abs().amax(1, keepdim=True)).flatten().double()
        companded = 127 * 2 * scaled / (1 + scaled.abs()) if signed else 255 * scaled.sqrt()
        codes, _ = coding.quantize(values, uniform(4096))
        assert torch.equal(codes - (127 if signed else 0), companded.round().long())


def test_the_floor_keeps_positive_second_moments() -> None:
    """Negative controls: without it, or to nearest, they vanish."""
    values = moments(4096, signed=False, decades=12.0)
    for codec in (OURS, OURS_NEAREST, DYNAMIC_FAIR, *CANDIDATES):
        assert bool((round_trip(codec.v, values, uniform(4096)) > 0).all()), codec.name
    for codec in (DYNAMIC_NO_FLOOR, DYNAMIC_NEAREST, FLASHOPTIM):
        assert bool((round_trip(codec.v, values, uniform(4096)) == 0).any()), codec.name


def test_power_of_two_scales_are_powers_of_two_and_hold_the_absmax() -> None:
    coding = CANDIDATES[0].m
    values = moments(4096, signed=True)
    _, scales = coding.quantize(values, uniform(4096))
    absmax = values.view(-1, 256).abs().amax(1)
    assert bool((torch.frexp(scales).mantissa == 0.5).all())
    assert bool(((scales >= absmax) & (scales < 2 * absmax)).all())


def test_tapered_floats_shorten_their_mantissas_on_the_way_down() -> None:
    """One binade of four codes above two of two: steps by hand."""
    values = tapered([(1, 4), (2, 2)], signed=False).values
    wanted = [0, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]
    assert values.tolist() == pytest.approx([value / 0.875 for value in wanted])
