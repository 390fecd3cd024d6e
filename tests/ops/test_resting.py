"""Weights at rest: what the codes mean, how far they lie from the weights, and the same bits from the C++ kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lisa_kernels import native
from lisa_kernels.errors import InputError
from lisa_kernels.ops.resting import (
    GROUP,
    KINDS,
    RestingWeight,
    bytes_at_rest,
    code_count,
    cpu_kernel,
    dequantize_resting_,
    quantize_resting,
    reference,
    rows_of_a_tile,
    scale_count,
)

LIBRARY = native.load()
OF_KIND = pytest.mark.parametrize("kind", KINDS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def instruction_sets() -> list[int]:
    return [] if LIBRARY is None else list(range(LIBRARY.instruction_set + 1))


def normal(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values whose scale changes by up to five decades every hundred elements."""
    generator = torch.Generator().manual_seed(seed)
    decades = torch.rand(-(-n // 100), generator=generator).repeat_interleave(100)[:n] * 5 - 4
    return (torch.randn(n, generator=generator) * 10**decades).to(dtype)


def returned(weight: Tensor, kind: str) -> Tensor:
    return dequantize_resting_(torch.empty_like(weight), *quantize_resting(weight, kind), kind)


def even(n: int, seed: int = 0) -> Tensor:
    """Values whose blocks' absmaxes differ by a few times, as a matrix of a model has them."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, generator=generator)
        * (1 + torch.rand(-(-n // 64), generator=generator)).repeat_interleave(64)[:n]
    )


def scales_of(weight: Tensor) -> Tensor:
    """The scale of each block as it is read, [blocks, 1]."""
    return reference.decode_scales(quantize_resting(weight, "nf4")[1], -(-weight.numel() // 64))[:, None]


def test_scales_lie_within_half_a_step_of_the_absmax(device: torch.device) -> None:
    """Evenly apart in the bits of floats: of a group over all scales no further than of one over a few."""
    for values, far in ((even(GROUP * 5 + 700), 0.004), (normal(GROUP * 5 + 700), 0.05)):
        absmax = reference.block_absmax(values)
        off = (scales_of(values.to(device)).cpu().flatten() / absmax - 1).abs()
        assert far / 3 < float(off.max()) <= far


def test_absmaxes_of_16_bits_that_differ_little_are_kept(device: torch.device) -> None:
    absmax = torch.tensor([1.5, 1.5078125]).repeat(16)
    weight = absmax.repeat_interleave(64).to(device)
    assert torch.equal(scales_of(weight).flatten().cpu(), absmax)
    assert torch.allclose(scales_of(weight * 1.1).flatten().cpu(), absmax * 1.1, rtol=2**-16, atol=0)


def test_scales_reach_from_the_smallest_to_the_largest_there_is(device: torch.device) -> None:
    absmax = torch.tensor([2.0**-120, 2.0**127, 1.0, 3.0]).repeat(8)
    found = scales_of(absmax.repeat_interleave(64).to(device)).flatten().cpu()
    assert found.isfinite().all()
    assert torch.allclose(found.log2(), absmax.log2(), rtol=0, atol=0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_weight_that_is_not_finite_is_known(value: float, kind: str, device: torch.device) -> None:
    """Its group comes back as NaN, and no other does."""
    weight = even(GROUP * 3).view(96, 64).to(device)
    assert RestingWeight(*quantize_resting(weight, kind), kind, 96, 64).is_finite()
    weight[40, 5] = value
    resting = RestingWeight(*quantize_resting(weight, kind), kind, 96, 64)
    assert not resting.is_finite()
    assert resting.woken(torch.float32).isnan().any(dim=1).nonzero().flatten().tolist() == list(range(32, 64))


def test_an_int8_weight_comes_back_to_half_a_step_of_its_block(device: torch.device) -> None:
    weight = even(4096 * 3).to(device)
    steps = scales_of(weight) / 127
    error = (returned(weight, "int8") - weight).view(-1, 64).abs() / steps
    # Where a scale is below the absmax, the largest of its block is beyond 127 steps by as little.
    assert 0.49 < float(error.max()) <= 0.5 + 1e-4


def test_an_nf4_weight_becomes_the_nearest_level_of_its_block(device: torch.device) -> None:
    weight = normal(4096).to(device)
    offered = torch.tensor(reference.LEVELS, device=device) * scales_of(weight)[..., None]
    nearest = (weight.view(-1, 64, 1) - offered).abs().amin(2)
    error = (returned(weight, "nf4") - weight).view(-1, 64).abs()
    assert torch.allclose(error, nearest, rtol=1e-5, atol=1e-6 * float(nearest.max()))


@OF_KIND
def test_zeros_come_back_exactly(kind: str, device: torch.device) -> None:
    weight = torch.zeros(3, 64, device=device)
    weight[1, 5], weight[2, 7] = -3.25, 2.0**-140
    back = returned(weight, kind)
    assert torch.equal(back == 0, weight.abs() < 2.0**-130)
    assert torch.allclose(back, weight, rtol=0.01, atol=2.0**-126)


@DTYPES
def test_a_weight_that_came_back_rests_as_it_did(dtype: torch.dtype, device: torch.device) -> None:
    """What others quantised to these levels and gave in 16 bits has its codes again."""
    weight = even(4096).to(device, dtype)
    codes, scales = quantize_resting(weight, "nf4")
    once = dequantize_resting_(torch.empty_like(weight), codes, scales, "nf4")
    assert torch.equal(quantize_resting(once, "nf4")[0], codes)


@OF_KIND
def test_rows_of_whole_groups_are_decoded_alone(kind: str, device: torch.device) -> None:
    weight = even(83 * 128).view(83, 128).to(device)
    resting = RestingWeight(*quantize_resting(weight, kind), kind, 83, 128)
    for rows in (slice(16, 64), slice(64, 83)):
        assert torch.equal(resting.rows(rows).woken(torch.float32), returned(weight, kind)[rows])
    for columns in (1, 64, 96, 127, 2048, 5000):
        assert rows_of_a_tile(columns) * columns % GROUP == 0


def test_nf4_is_bitsandbytes_own() -> None:
    """Where scales are exact: codes, absmax and weights; and whatever the scales, its checkpoints' codes."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    ties = torch.tensor([*reference.MIDDLES, 1.0]).repeat(4)
    weight = torch.cat([torch.randn(GROUP * 4, generator=torch.Generator().manual_seed(0)), ties]).view(-1, 64)
    weight = (weight / weight.abs().amax(1, keepdim=True)).flatten()
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, _ = quantize_resting(weight, "nf4")
    assert torch.equal(state.code, torch.tensor(reference.LEVELS))
    assert torch.equal(state.absmax, scales_of(weight).flatten())
    assert torch.equal(theirs.flatten(), codes)
    assert torch.equal(functional.dequantize_4bit(theirs, state).flatten(), returned(weight, "nf4"))
    for nested in (False, True):
        weight = even(GROUP * 20)
        theirs, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
        meant = functional.dequantize_4bit(theirs, state).flatten()
        assert torch.equal(quantize_resting(meant, "nf4")[0], theirs.flatten())
        assert torch.allclose(returned(meant, "nf4"), meant, rtol=0.004, atol=0)


def test_scales_in_8_bits_cost_next_to_nothing() -> None:
    """Of what a weight loses in 4 bits, and less than bitsandbytes' own double quantisation does."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = even(GROUP * 50)

    def lost(back: Tensor) -> float:
        return float((back - weight).square().sum())

    theirs = {
        nested: lost(
            functional.dequantize_4bit(
                *functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
            )
        )
        for nested in (False, True)
    }
    ours = lost(returned(weight, "nf4"))
    assert ours < 1.0005 * theirs[False] < theirs[True]


@pytest.mark.skipif(LIBRARY is None, reason=native.why_absent())
@pytest.mark.parametrize("instruction_set", instruction_sets(), ids=lambda index: native.INSTRUCTION_SETS[index])
@DTYPES
@OF_KIND
def test_the_cpu_kernels_give_the_definitions_bits(kind: str, dtype: torch.dtype, instruction_set: int) -> None:
    assert LIBRARY is not None
    library = replace(LIBRARY, instruction_set=instruction_set)
    quantize = reference.quantize_int8 if kind == "int8" else reference.quantize_nf4
    dequantize = reference.dequantize_int8 if kind == "int8" else reference.dequantize_nf4
    middles = torch.tensor([*reference.MIDDLES, 1.0] * 4)
    for values in (
        *(normal(n, n) for n in (0, 1, 63, 64, 65, 4097, 70001)),
        torch.zeros(130),
        normal(300) * 1e-41,
        middles,
    ):
        values = values.to(dtype)
        codes, scales = cpu_kernel.quantize(library, values, kind)
        expected = quantize(values)
        assert torch.equal(scales, expected[1])
        assert torch.equal(codes, expected[0])
        out = torch.full_like(values, 7.0)
        cpu_kernel.dequantize_(library, out, codes, scales, kind)
        assert torch.equal(out, dequantize(codes, scales, values.numel()).to(dtype))
    for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        values = even(3 * GROUP).to(dtype)
        values[GROUP + 700] = bad
        assert torch.equal(cpu_kernel.quantize(library, values, kind)[1], quantize(values)[1])


@OF_KIND
@DTYPES
def test_the_operations_pass_torchs_own_checks(dtype: torch.dtype, kind: str) -> None:
    weight = normal(130, dtype=dtype)
    torch.library.opcheck(torch.ops.lisa_kernels.quantize_resting, (weight, kind))
    arguments = (torch.empty_like(weight), *quantize_resting(weight, kind), kind)
    torch.library.opcheck(torch.ops.lisa_kernels.dequantize_resting_, arguments)


@OF_KIND
def test_the_planner_sees_the_bytes(kind: str) -> None:
    with FakeTensorMode():
        weight = torch.empty(33, 65, dtype=torch.bfloat16)
        codes, scales = quantize_resting(weight, kind)
        assert dequantize_resting_(torch.empty_like(weight), codes, scales, kind).shape == (33, 65)
    assert (codes.nbytes, scales.nbytes) == (code_count(33 * 65, kind), scale_count(33 * 65))
    assert bytes_at_rest(4096 * 4096, kind) == 4096 * 4096 * (1 if kind == "int8" else 0.5) + 8192 * 36


def test_what_cannot_rest_is_refused() -> None:
    weight = torch.ones(8, 64)
    codes, scales = quantize_resting(weight, "nf4")
    with pytest.raises(InputError, match=r"kind 'int4'.*int8"):
        quantize_resting(weight, "int4")
    with pytest.raises(InputError, match=r"the weight is torch\.float64; float32"):
        quantize_resting(weight.double(), "nf4")
    with pytest.raises(InputError, match=r"the weight is torch\.float32, not contiguous"):
        quantize_resting(weight.t(), "nf4")
    with pytest.raises(InputError, match=r"512 weights in int8 need uint8 \[512\] and uint8 \[36\]"):
        dequantize_resting_(torch.empty(8, 64), codes, scales, "int8")
    with pytest.raises(InputError, match=r"out is torch\.float32, not contiguous"):
        dequantize_resting_(torch.empty(64, 8).t(), codes, scales, "nf4")
