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
    KINDS,
    block_count,
    code_count,
    cpu_kernel,
    dequantize_resting_,
    quantize_resting,
    reference,
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


def test_an_int8_weight_comes_back_to_half_a_step_of_its_block(device: torch.device) -> None:
    weight = normal(4096 * 3).to(device)
    steps = weight.view(-1, 64).abs().amax(1, keepdim=True) / 127
    error = (returned(weight, "int8") - weight).view(-1, 64).abs() / steps
    assert 0.49 < float(error.max()) <= 0.5 + 1e-4


def test_an_nf4_weight_becomes_the_nearest_level_of_its_block(device: torch.device) -> None:
    weight = normal(4096).to(device)
    blocks = weight.view(-1, 64, 1)
    offered = torch.tensor(reference.LEVELS, device=device) * blocks.abs().amax(1, keepdim=True)
    nearest = (blocks - offered).abs().amin(2)
    assert torch.allclose((returned(weight, "nf4") - weight).view(-1, 64).abs(), nearest, rtol=1e-5, atol=0)


@OF_KIND
def test_zero_and_a_blocks_largest_come_back_exactly(kind: str, device: torch.device) -> None:
    weight = torch.zeros(3, 64, device=device)
    weight[1, 5], weight[2, 7] = -3.25, 2.0**-140
    back = returned(weight, kind)
    assert torch.equal(back[:2], weight[:2]) or kind == "int8"
    assert torch.allclose(back, weight, rtol=2**-23, atol=2.0**-126)


@DTYPES
@OF_KIND
def test_a_weight_that_came_back_rests_as_it_did(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Nothing is lost by being quantised again: masters that did not move leave the codes alone."""
    weight = normal(4096, dtype=dtype).to(device)
    codes, absmax = quantize_resting(weight, kind)
    once = dequantize_resting_(torch.empty_like(weight), codes, absmax, kind)
    again = quantize_resting(once, kind)[0]
    assert torch.equal(again, codes)


@OF_KIND
def test_rows_of_whole_blocks_are_decoded_alone(kind: str, device: torch.device) -> None:
    weight = normal(16 * 128).view(16, 128).to(device)
    codes, absmax = quantize_resting(weight, kind)
    rows = slice(4 * code_count(128, kind), 9 * code_count(128, kind)), slice(4 * 2, 9 * 2)
    part = dequantize_resting_(torch.empty(5, 128, device=device), codes[rows[0]], absmax[rows[1]], kind)
    assert torch.equal(part, returned(weight, kind)[4:9])


def test_nf4_is_bitsandbytes_own() -> None:
    """Codes, absmax and weights, so that a checkpoint of theirs can be the resting copy."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.cat([normal(64 * 500), torch.randn(64 * 500), torch.tensor([*reference.MIDDLES, 1.0]).repeat(4)])
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, absmax = quantize_resting(weight, "nf4")
    assert torch.equal(state.code, torch.tensor(reference.LEVELS))
    assert torch.equal(state.absmax, absmax)
    assert torch.equal(theirs.flatten(), codes)
    assert torch.equal(functional.dequantize_4bit(theirs, state).flatten(), returned(weight, "nf4"))


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
        codes, absmax = cpu_kernel.quantize(library, values, kind)
        expected = quantize(values)
        assert torch.equal(codes, expected[0])
        assert torch.equal(absmax, expected[1])
        out = torch.full_like(values, 7.0)
        cpu_kernel.dequantize_(library, out, codes, absmax, kind)
        assert torch.equal(out, dequantize(codes, absmax, values.numel()).to(dtype))


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
        codes, absmax = quantize_resting(weight, kind)
        assert dequantize_resting_(torch.empty_like(weight), codes, absmax, kind).shape == (33, 65)
    assert codes.nbytes + absmax.nbytes == code_count(33 * 65, kind) + 4 * block_count(33 * 65)


def test_what_cannot_rest_is_refused() -> None:
    weight = torch.ones(8, 64)
    codes, absmax = quantize_resting(weight, "nf4")
    with pytest.raises(InputError, match=r"kind 'int4'.*int8"):
        quantize_resting(weight, "int4")
    with pytest.raises(InputError, match=r"the weight is torch\.float64; float32"):
        quantize_resting(weight.double(), "nf4")
    with pytest.raises(InputError, match=r"the weight is torch\.float32, not contiguous"):
        quantize_resting(weight.t(), "nf4")
    with pytest.raises(InputError, match=r"512 weights in int8 need uint8 \[512\] and float32 \[8\]"):
        dequantize_resting_(torch.empty(8, 64), codes, absmax, "int8")
    with pytest.raises(InputError, match=r"out is torch\.float32, not contiguous"):
        dequantize_resting_(torch.empty(64, 8).t(), codes, absmax, "nf4")
