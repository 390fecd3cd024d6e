"""Sizes, dtypes, strides, block sizes and extreme values as hypothesis finds them: kernels against definitions."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from lisa_kernels import native
from lisa_kernels.ops.adamw8 import Hyper, adamw8_, adamw32_, reference, step_scalars
from lisa_kernels.ops.blockwise8 import block_count, dequantize_blockwise, quantize_blockwise
from lisa_kernels.ops.blockwise8 import reference as blockwise8_reference
from lisa_kernels.ops.random_bits import moment_bits, random_key, random_words
from lisa_kernels.optim import AdamW8bit

needs_library = pytest.mark.skipif(native.load() is None, reason=native.why_absent())
# The same examples every time: a failure is a fact about the code, not about the day.
FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
BLOCK_SIZES = st.sampled_from([1 << power for power in range(4, 17)])
SIZES = st.one_of(st.integers(1, 80), st.integers(1, 5000), st.sampled_from([255, 256, 257, 4096, 4097]))
SEEDS = st.integers(0, 2**32)


def one_nonzero(n: int, generator: torch.Generator) -> Tensor:
    values = torch.zeros(n)
    values[int(torch.randint(n, (), generator=generator))] = 0.25
    return values


def decades(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * 10 - 8)


VALUES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "normal": lambda n, generator: torch.randn(n, generator=generator),
    "decades": decades,
    "denormals": lambda n, generator: torch.randn(n, generator=generator) * 1e-41,
    "zeros": lambda n, _: torch.zeros(n),
    "minus-zeros": lambda n, _: -torch.zeros(n),
    "one-nonzero": one_nonzero,
    # As large as a step takes; float16 gradients become infinite, and their step is skipped.
    "1e18": lambda n, generator: torch.randn(n, generator=generator).clamp(-9, 9) * 1e18,
}
KINDS = st.sampled_from(sorted(VALUES))


def made(kind: str, n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = VALUES[kind](n, torch.Generator().manual_seed(seed))
    return values.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else values.to(dtype)


def assert_equal_bits(ours: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        view = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[one.element_size()]
        assert torch.equal(one.view(view), other.view(view))


@st.composite
def lists_of_tensors(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor]]:
    """Draw up to four weights and their gradients."""
    weights, grads = [], []
    for _ in range(draw(st.integers(1, 4))):
        n, seed = draw(SIZES), draw(SEEDS)
        weights.append(made("normal", n, seed, draw(DTYPES)))
        grads.append(made(draw(KINDS), n, seed + 1, draw(DTYPES)))
    return weights, grads


def shared_arguments(k: int, seed: int, step: int) -> dict[str, Tensor]:
    keys = torch.stack([random_key(seed, index, torch.tensor(step)) for index in range(k)])
    scalars = step_scalars(torch.full((k,), step), Hyper(1e-3, 0.9, 0.999, 1e-8, 1e-2), torch.tensor(1.0))
    return {"scalars": scalars, "keys": keys, "skip": torch.tensor(False)}


@needs_library
@FUZZ
@given(lists_of_tensors(), BLOCK_SIZES, st.booleans(), SEEDS)
def test_two_steps_of_lists_of_tensors_equal_the_definition(
    tensors: tuple[list[Tensor], list[Tensor]], block_size: int, stochastic: bool, seed: int
) -> None:
    weights, grads = tensors
    sizes = [weight.numel() for weight in weights]
    codes = [torch.zeros(n, dtype=torch.uint8) for n in sizes]
    absmax = [torch.zeros(block_count(n, block_size)) for n in sizes]
    state8, state32 = (weights, codes, absmax, codes, absmax), (weights, *[[torch.zeros(n) for n in sizes]] * 2)
    ours8, theirs8 = ([[tensor.clone() for tensor in part] for part in state8] for _ in range(2))
    ours32, theirs32 = ([[tensor.clone() for tensor in part] for part in state32] for _ in range(2))
    for step in (1, 2):
        shared = shared_arguments(len(sizes), seed, step)
        adamw8_(ours8[0], grads, *ours8[1:], **shared, block_size=block_size, stochastic=stochastic)
        reference.adamw8_(theirs8[0], grads, *theirs8[1:], *shared.values(), block_size, stochastic)
        adamw32_(ours32[0], grads, *ours32[1:], **shared, stochastic=stochastic)
        reference.adamw32_(theirs32[0], grads, *theirs32[1:], *shared.values(), stochastic)
    for ours, theirs in ((ours8, theirs8), (ours32, theirs32)):
        for one, other in zip(ours, theirs):
            assert_equal_bits(one, other)


@needs_library
@FUZZ
@given(SIZES, KINDS, BLOCK_SIZES, st.booleans(), st.booleans(), SEEDS)
def test_the_codec_equals_the_definition(
    n: int, kind: str, block_size: int, signed: bool, stochastic: bool, seed: int
) -> None:
    values = made(kind, n, seed)
    values = values if signed else values.abs()
    key, name = random_key(seed, 0, torch.tensor(1)), "m" if signed else "v"
    bits = moment_bits(random_words(key, 0, n), signed) if stochastic else None
    ours = quantize_blockwise(values, name, block_size, key if stochastic else None)
    assert_equal_bits(list(ours), list(blockwise8_reference.quantize(values, signed, block_size, bits)))
    decoded = dequantize_blockwise(*ours, name, block_size)
    assert_equal_bits([decoded], [blockwise8_reference.dequantize(*ours, signed, block_size)])


def strided(values: Tensor, layout: str) -> Tensor:
    """Return the matrix `values` with other strides."""
    rows, columns = values.shape
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "every-second":
        return torch.zeros(rows, 2 * columns, dtype=values.dtype)[:, ::2].copy_(values)
    if layout == "offset":
        return torch.zeros(rows * columns + 1, dtype=values.dtype)[1:].view(rows, columns).copy_(values)
    return values.clone()


LAYOUTS = st.sampled_from(["dense", "transposed", "every-second", "offset"])


@FUZZ
@given(st.integers(1, 90), st.integers(1, 90), LAYOUTS, LAYOUTS, DTYPES, DTYPES, KINDS, BLOCK_SIZES, SEEDS)
def test_the_optimizer_does_not_care_about_strides(
    rows: int, columns: int, weight_layout: str, grad_layout: str, weight_dtype: torch.dtype, grad_dtype: torch.dtype,
    kind: str, block_size: int, seed: int,
) -> None:  # fmt: skip
    """A weight and gradient with whatever strides move bit for bit as dense ones."""
    weight = made("normal", rows * columns, seed, weight_dtype).view(rows, columns)
    grad = made(kind, rows * columns, seed + 1, grad_dtype).view(rows, columns)
    params = []
    for layouts in (("dense", "dense"), (weight_layout, grad_layout)):
        param = nn.Parameter(strided(weight, layouts[0]))
        param.grad_dtype = grad_dtype
        optimizer = AdamW8bit([param], block_size=block_size, seed=seed)
        for _ in range(2):
            param.grad = strided(grad, layouts[1])
            optimizer.step()
        params.append(param)
    dense, other = (param.detach() for param in params)
    assert other.stride() == strided(weight, weight_layout).stride()
    assert_equal_bits([dense.contiguous()], [other.contiguous()])
