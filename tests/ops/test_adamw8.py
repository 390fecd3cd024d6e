"""One AdamW step, and 800 of them: the 8-bit form follows the mathematics, and its details are as promised."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tolerances import (
    ADAMW_100_STEPS,
    ADAMW_UPDATE,
    ADAMW_WEIGHT,
    CODEC_SCALING,
    CODEC_STOCHASTIC,
    STANDARD_ERRORS,
    TRAJECTORY_NMSE,
    TRAJECTORY_WORST_UPDATE,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_kernels.errors import InputError
from lisa_kernels.ops.adamw8 import Hyper, adamw8_, adamw32_, reference, step_scalars
from lisa_kernels.ops.blockwise8 import block_count, dequantize_blockwise
from lisa_kernels.ops.random_bits import random_key

HYPER = Hyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
SIZES = [0, 1, 255, 256, 257, 4097]
BITS = [8, 32]
either_form = pytest.mark.parametrize("bits", BITS, ids=["8-bit", "32-bit"])


def scalar(value: float | bool, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Moments:
    """The state of one tensor in either form, and how a step is taken on it."""

    def __init__(self, bits: int, count: int, device: torch.device | None = None, block_size: int = 256) -> None:
        self.bits, self.block_size, self.device = bits, block_size, device
        blocks = block_count(count, block_size)
        if bits == 8:
            codes = {name: torch.zeros(count, dtype=torch.uint8, device=device) for name in ("m", "v")}
            scales = {name: torch.zeros(blocks, device=device) for name in ("m", "v")}
            self.tensors = [codes["m"], scales["m"], codes["v"], scales["v"]]
        else:
            self.tensors = [torch.zeros(count, device=device), torch.zeros(count, device=device)]

    def arguments(
        self, t: int, hyper: Hyper = HYPER, skip: bool = False, scale: float = 1.0, seed: int = 0, parameter: int = 0
    ) -> dict[str, Tensor]:
        clock = torch.full((1,), t, dtype=torch.int64, device=self.device)
        return {
            "scalars": step_scalars(clock, hyper, scalar(scale, torch.float32, self.device)),
            "keys": random_key(seed, parameter, clock[0]).view(1),
            "skip": scalar(skip, torch.bool, self.device),
        }

    def step(
        self, param: Tensor, grad: Tensor, t: int = 1, *, hyper: Hyper = HYPER, skip: bool = False, scale: float = 1.0,
        stochastic: bool = True, seed: int = 0, parameter: int = 0,
    ) -> None:  # fmt: skip
        options: dict[str, Any] = {"block_size": self.block_size} if self.bits == 8 else {}
        take: Callable[..., None] = adamw8_ if self.bits == 8 else adamw32_
        arguments = self.arguments(t, hyper, skip, scale, seed, parameter)
        take([param], [grad], *self.lists(), **arguments, stochastic=stochastic, **options)

    def step_by_definition(
        self, param: Tensor, grad: Tensor, t: int = 1, hyper: Hyper = HYPER, stochastic: bool = True
    ) -> None:
        options: list[Any] = [self.block_size] if self.bits == 8 else []
        take: Callable[..., None] = reference.adamw8_ if self.bits == 8 else reference.adamw32_
        take([param], [grad], *self.lists(), *self.arguments(t, hyper).values(), *options, stochastic)

    def step_at(self, start: int, param: Tensor, grad: Tensor, t: int, by_definition: bool) -> None:
        """Step a part of a larger tensor."""
        options: list[Any] = [self.block_size] if self.bits == 8 else []
        given = [param], [grad], *self.lists()
        arguments = self.arguments(t)
        if by_definition:
            take: Callable[..., None] = reference.adamw8_ if self.bits == 8 else reference.adamw32_
            take(*given, *arguments.values(), *options, True, [start])
        else:
            named = {"block_size": self.block_size} if self.bits == 8 else {}
            (adamw8_ if self.bits == 8 else adamw32_)(*given, **arguments, **named, starts=[start])

    def lists(self) -> list[list[Tensor]]:
        return [[tensor] for tensor in self.tensors]

    def decoded(self) -> tuple[Tensor, Tensor]:
        if self.bits == 32:
            return self.tensors[0], self.tensors[1]
        m_codes, m_absmax, v_codes, v_absmax = self.tensors
        m = dequantize_blockwise(m_codes, m_absmax, "m", self.block_size)
        return m, dequantize_blockwise(v_codes, v_absmax, "v", self.block_size)

    def copies(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.tensors]


def exact_step(w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, hyper: Hyper = HYPER) -> tuple[Tensor, ...]:
    """Return float64 (weight, m, v) after one step, by the formulas of the paper."""
    w, g, m, v = (tensor.double() for tensor in (w, g, m, v))
    m = hyper.beta1 * m + (1 - hyper.beta1) * g
    v = hyper.beta2 * v + (1 - hyper.beta2) * g * g
    update = (m / (1 - hyper.beta1**t)) / ((v / (1 - hyper.beta2**t)).sqrt() + hyper.eps)
    return w - hyper.lr * hyper.weight_decay * w - hyper.lr * update, m, v


@either_form
@pytest.mark.parametrize("t", [1, 2, 1000, 1_000_000], ids=str)
@pytest.mark.parametrize("count", SIZES, ids=str)
def test_a_step_equals_the_float64_formulas(bits: int, t: int, count: int, device: torch.device) -> None:
    """The 8-bit form's update uses the fresh, unquantised moments: its weight errs no more than the 32-bit form's."""
    state = Moments(bits, count, device)
    warm = normal(count, seed=1).to(device)
    state.step(warm.clone(), warm, 1)
    m, v = (tensor.clone() for tensor in state.decoded())
    weight, grad = normal(count, seed=2).to(device), normal(count, seed=3).to(device)
    exact_w, exact_m, exact_v = exact_step(weight, grad, m, v, t)
    update = (exact_w - weight.double() * (1 - HYPER.lr * HYPER.weight_decay)).abs()
    bound = ADAMW_WEIGHT * weight.double().abs() + ADAMW_UPDATE * update + ADAMW_UPDATE * HYPER.lr
    state.step(weight, grad, t)
    assert bool(((weight.double() - exact_w).abs() <= bound).all())
    codec = CODEC_STOCHASTIC + CODEC_SCALING if bits == 8 else 0.0
    for given, exact in zip(state.decoded(), (exact_m, exact_v)):
        largest = float(exact.abs().max()) if count else 0.0
        # What lies under the smallest first moment of its block, 2**-16 of the absmax, may vanish.
        allowed = (codec + ADAMW_UPDATE) * exact.abs() + (largest * 2.0**-15 if bits == 8 else ADAMW_UPDATE * largest)
        assert bool(((given.double() - exact).abs() <= allowed).all())


def test_32_bits_to_nearest_tracks_torchs_adamw_for_100_steps(device: torch.device) -> None:
    count = 1000
    weight = normal(count).to(device)
    theirs = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    state = Moments(32, count, device)
    for t in range(1, 101):
        grad = normal(count, seed=t).to(device)
        theirs.grad = grad.clone()
        optimizer.step()
        state.step(weight, grad, t, stochastic=False)
    assert float((weight - theirs.detach()).abs().max()) <= ADAMW_100_STEPS
    assert float((weight - normal(count).to(device)).abs().max()) > 100 * ADAMW_100_STEPS


# 800 unsynchronised steps

COUNT, STEPS = 4096, 800
TRAJECTORY = Hyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-12, weight_decay=0.0)


class NoisyQuadratic:
    """Gradients s·(w − w* + noise) whose scales s spread over `decades` within every block."""

    def __init__(self, decades: float) -> None:
        generator = torch.Generator().manual_seed(11)
        self.generator = generator
        self.scale = 10.0 ** (torch.rand(COUNT, generator=generator, dtype=torch.float64) * decades - decades / 2)
        self.target = torch.randn(COUNT, generator=generator, dtype=torch.float64) * 3

    def noise(self) -> Tensor:
        return torch.randn(COUNT, generator=self.generator, dtype=torch.float64)

    def gradient(self, weight: Tensor, noise: Tensor) -> Tensor:
        return self.scale * (weight.double() - self.target + noise)


def follow(decades: float, take_step: Callable[[Moments, Tensor, Tensor, int], None]) -> tuple[float, float]:
    """Return (NMSE of the total update against float64 AdamW, largest single update in units of lr)."""
    problem = NoisyQuadratic(decades)
    state, weight = Moments(8, COUNT), torch.zeros(COUNT)
    exact = [torch.zeros(COUNT, dtype=torch.float64) for _ in range(3)]
    worst = 0.0
    for t in range(1, STEPS + 1):
        noise = problem.noise()
        exact = list(exact_step(exact[0], problem.gradient(exact[0], noise), exact[1], exact[2], t, TRAJECTORY))
        before = weight.clone()
        take_step(state, weight, problem.gradient(weight, noise).float(), t)
        worst = max(worst, float((weight - before).abs().max()) / TRAJECTORY.lr)
    error = float(((weight.double() - exact[0]) ** 2).sum() / (exact[0] ** 2).sum())
    return (error if math.isfinite(error) else math.inf), worst


@pytest.mark.parametrize(
    "decades",
    [1.0, 3.0, 4.0, 5.0],
    ids=["1-decade", "3-decades", "4-decades", "5-decades-beyond-the-range-of-m"],
)
def test_800_steps_that_are_never_synchronised_stay_near_float64(decades: float) -> None:
    def take_step(state: Moments, weight: Tensor, grad: Tensor, t: int) -> None:
        state.step(weight, grad, t, hyper=TRAJECTORY)

    error, worst = follow(decades, take_step)
    assert error <= TRAJECTORY_NMSE
    assert worst <= TRAJECTORY_WORST_UPDATE


def test_the_trajectory_check_sees_a_format_without_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: to nearest, and a second moment that may become code 0 while the first survives."""
    quantize = reference.quantize

    def without_floor(values: Tensor, signed: bool, block_size: int, bits20: Tensor | None) -> tuple[Tensor, Tensor]:
        codes, absmax = quantize(values, signed, block_size, None)
        if not signed:
            smallest = absmax.repeat_interleave(block_size)[: values.numel()] * 2.0**-32
            codes = torch.where(values < smallest, 0, codes.int()).to(torch.uint8)
        return codes, absmax

    monkeypatch.setattr(reference, "quantize", without_floor)

    def take_step(state: Moments, weight: Tensor, grad: Tensor, t: int) -> None:
        state.step_by_definition(weight, grad, t, TRAJECTORY)

    error, worst = follow(5.0, take_step)
    assert error > 100 * TRAJECTORY_NMSE
    assert worst > 100 * TRAJECTORY_WORST_UPDATE


def shrunken_second_moment(stochastic: bool) -> Tensor:
    """Return v [255] over its exact value, 300 steps after all gradients of a block but one shrank tenfold."""
    hyper = HYPER._replace(beta2=0.99)
    state, weight, exact = Moments(8, 256), torch.zeros(256), 0.0
    for t in range(1, 401):
        grad = torch.full((256,), 1.0 if t <= 100 else 0.1)
        grad[0] = 1.0
        exact = 0.99 * exact + 0.01 * float(grad[1]) ** 2
        state.step(weight, grad, t, hyper=hyper, stochastic=stochastic)
    return state.decoded()[1][1:].double() / exact


def test_the_second_moment_follows_gradients_that_shrink() -> None:
    """Nearest rounding, the negative control, returns the same code for ever."""
    ratio = shrunken_second_moment(stochastic=True)
    assert abs(float(ratio.mean()) - 1) <= STANDARD_ERRORS * float(ratio.std()) / math.sqrt(ratio.numel())
    assert float(shrunken_second_moment(stochastic=False).min()) > 5


# Random numbers


@either_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_results_do_not_depend_on_the_chunk_size(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for chunk in (1 << 20, 512, 1024):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        state, weight = Moments(bits, 4097), normal(4097, dtype=dtype)
        for t in (1, 2, 3):
            state.step_by_definition(weight, normal(4097, seed=t, dtype=dtype), t)
        results.append([weight, *state.copies()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@either_form
def test_an_elements_result_depends_on_its_index_and_not_on_the_tensors_length(bits: int) -> None:
    long, short = normal(1000, dtype=torch.bfloat16), normal(1000, dtype=torch.bfloat16)[:512].clone()
    grad = normal(1000, seed=1)
    states = Moments(bits, 1000), Moments(bits, 512)
    states[0].step(long, grad)
    states[1].step(short, grad[:512].clone())
    assert torch.equal(long[:512], short)
    assert torch.equal(states[0].tensors[0][:512], states[1].tensors[0])


@either_form
@pytest.mark.parametrize("changed", [{"seed": 1}, {"parameter": 1}, {"t": 2}], ids=["seed", "parameter", "step"])
def test_seed_parameter_and_step_each_change_the_rounding(bits: int, changed: dict[str, int]) -> None:
    hyper = HYPER._replace(lr=1e-4)
    results = []
    for options in ({}, {}, changed):
        weight, state = normal(4096, dtype=torch.bfloat16), Moments(bits, 4096)
        state.step(weight, normal(4096, seed=1), hyper=hyper, **options)  # type: ignore[arg-type]
        results.append(weight)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def bfloat16_displacement(bits: int, stochastic: bool) -> tuple[Tensor, Tensor]:
    """Return how far bfloat16 and float32 weights moved in 100 steps of lr 1e-6, float64."""
    count = 16384
    hyper = HYPER._replace(lr=1e-6, weight_decay=0.0)
    start = normal(count).abs().clamp_min(0.5).bfloat16()
    small, full = start.clone(), start.float()
    states = Moments(bits, count), Moments(bits, count)
    for t in range(1, 101):
        grad = 1.0 + 0.3 * normal(count, seed=t)
        states[0].step(small, grad, t, hyper=hyper, stochastic=stochastic)
        states[1].step(full, grad, t, hyper=hyper, stochastic=stochastic)
    return small.double() - start.double(), full.double() - start.double()


@either_form
def test_bfloat16_weights_follow_float32_at_a_learning_rate_far_below_their_spacing(bits: int) -> None:
    """The mean displacement agrees within its standard error; nearest rounding, the negative control, stalls."""
    moved, wanted = bfloat16_displacement(bits, stochastic=True)
    standard_error = float(moved.std()) / math.sqrt(moved.numel())
    assert abs(float(moved.mean() - wanted.mean())) <= STANDARD_ERRORS * standard_error
    assert abs(float(wanted.mean())) > 10 * STANDARD_ERRORS * standard_error / 4
    stalled, _ = bfloat16_displacement(bits, stochastic=False)
    assert float(stalled.abs().max()) == 0.0


# What a step leaves alone, and what it takes into account


@either_form
@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0], ids=["nan", "inf", "finite"])
def test_a_skipped_step_leaves_everything_untouched(bits: int, bad: float, device: torch.device) -> None:
    weight, grad = normal(300, dtype=torch.bfloat16).to(device), normal(300, seed=1).to(device)
    state = Moments(bits, 300, device)
    state.step(weight, grad, 1)
    before = [weight.clone(), *state.copies()]
    grad[7] = bad
    state.step(weight, grad, 2, skip=True)
    assert all(torch.equal(a, b) for a, b in zip(before, [weight, *state.tensors]))
    state.step(weight, normal(300, seed=2).to(device), 2)
    assert not any(torch.equal(a, b) for a, b in zip(before[:2], [weight, *state.tensors]))


@either_form
def test_without_an_epsilon_a_weight_without_gradient_stays_finite(bits: int, device: torch.device) -> None:
    """torch's own AdamW divides 0 by 0 there."""
    hyper = HYPER._replace(eps=0.0)
    weight, grad = normal(300).to(device), normal(300, seed=1).to(device)
    grad[::2] = 0.0
    before, state = weight.clone(), Moments(bits, 300, device)
    state.step(weight, grad, 1, hyper=hyper)
    assert bool(weight.isfinite().all())
    decayed = before * (1 - hyper.lr * hyper.weight_decay)
    assert torch.allclose(weight[::2], decayed[::2], rtol=ADAMW_WEIGHT, atol=0)
    assert torch.allclose((weight - decayed)[1::2].abs(), torch.full_like(weight[1::2], hyper.lr), rtol=1e-4)


@either_form
def test_the_gradient_is_multiplied_by_the_scale(bits: int) -> None:
    results = []
    for factor in (1.0, 1024.0):
        weight, state = normal(300), Moments(bits, 300)
        state.step(weight, normal(300, seed=1) * factor, scale=1 / factor)
        results.append([weight, *state.tensors])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@either_form
def test_strided_parameters_and_gradients_step_as_their_contiguous_copies(bits: int) -> None:
    plain, grad = normal(20, 60), normal(20, 60, seed=1)
    strided, strided_grad = plain.t().contiguous().t(), grad.t().contiguous().t()
    assert not strided.is_contiguous()
    states = Moments(bits, 1200), Moments(bits, 1200)
    states[0].step(plain, grad)
    states[1].step(strided, strided_grad)
    assert torch.equal(plain, strided)
    assert all(torch.equal(a, b) for a, b in zip(states[0].tensors, states[1].tensors))


@either_form
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_operation_equals_its_definition_for_all_dtypes(
    bits: int, weight_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    weights = normal(700, dtype=weight_dtype), normal(700, dtype=weight_dtype)
    states = Moments(bits, 700), Moments(bits, 700)
    for t in (1, 2):
        grad = normal(700, seed=t, dtype=grad_dtype)
        states[0].step(weights[0], grad, t)
        states[1].step_by_definition(weights[1], grad, t)
    assert torch.equal(*weights)
    assert all(torch.equal(a, b) for a, b in zip(states[0].tensors, states[1].tensors))


class NoHostReads(TorchDispatchMode):
    """Fails on any operation that hands a tensor's value to Python, which on a GPU waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read on the host"
        return func(*args, **(kwargs or {}))


@either_form
def test_the_definition_never_reads_a_tensor_on_the_host(bits: int) -> None:
    weight, grad, state = normal(300, dtype=torch.bfloat16), normal(300), Moments(bits, 300)
    with NoHostReads():
        state.step_by_definition(weight, grad)
    with pytest.raises(AssertionError, match="on the host"), NoHostReads():
        bool(grad.sum() > 0)


@either_form
def test_the_definition_runs_on_fake_tensors(bits: int) -> None:
    with FakeTensorMode():
        weight, grad, state = torch.zeros(300, dtype=torch.bfloat16), torch.zeros(300), Moments(bits, 300)
        state.step_by_definition(weight, grad)


@either_form
@pytest.mark.parametrize("count", [1, 4097], ids=str)
def test_the_operations_pass_torchs_own_checks(bits: int, count: int) -> None:
    state = Moments(bits, count)
    options = (256, True) if bits == 8 else (True,)
    operation = torch.ops.lisa_kernels.adamw8_ if bits == 8 else torch.ops.lisa_kernels.adamw32_
    arguments = ([normal(count, dtype=torch.bfloat16)], [normal(count)], *state.lists(), *state.arguments(1).values())
    torch.library.opcheck(operation, (*arguments, *options))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        pytest.param({"param": torch.zeros(300, dtype=torch.float64)}, "parameter is.*float64.*wanted", id="float64"),
        pytest.param(
            {"grad": torch.zeros(300, dtype=torch.int32)}, "gradient torch.int32.*wanted", id="integer-gradient"
        ),
        pytest.param({"grad": torch.zeros(300).to_sparse()}, "gradient is.*sparse", id="sparse"),
        pytest.param({"grad": torch.zeros(301)}, r"\[301\].*\[300\]", id="shape"),
    ],
)
@either_form
def test_a_wrong_parameter_or_gradient_is_refused(bits: int, changed: dict[str, Tensor], words: str) -> None:
    given = SimpleNamespace(**{"param": torch.zeros(300), "grad": torch.zeros(300), **changed})
    with pytest.raises(InputError, match=words):
        Moments(bits, 300).step(given.param, given.grad)


@pytest.mark.parametrize(
    ("position", "wrong"),
    [
        pytest.param(0, torch.zeros(300), id="m-dtype"),
        pytest.param(1, torch.zeros(3), id="m-blocks"),
        pytest.param(2, torch.zeros(299, dtype=torch.uint8), id="v-count"),
        pytest.param(3, torch.zeros(1), id="v-blocks"),
    ],
)
def test_a_state_of_another_shape_is_refused(position: int, wrong: Tensor) -> None:
    state = Moments(8, 300)
    state.tensors[position] = wrong
    with pytest.raises(InputError, match=r"(m|v) has .* needs"):
        state.step(torch.zeros(300), torch.zeros(300))


@pytest.mark.parametrize("by_definition", [True, False], ids=["definition", "operation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "cut"), [(8, 768), (8, 2048), (32, 12), (32, 2048)])
def test_parts_of_a_tensor_become_what_the_whole_does(
    bits: int, cut: int, dtype: torch.dtype, by_definition: bool
) -> None:
    """Bit for bit over two steps, random numbers included; a part that is taken for a whole is not equal."""
    weight, states = normal(4097, dtype=dtype), [Moments(bits, n) for n in (4097, cut, 4097 - cut, 4097 - cut)]
    whole, first, rest, stray = weight.clone(), weight[:cut].clone(), weight[cut:].clone(), weight[cut:].clone()
    for t in (1, 2):
        grad = normal(4097, seed=t)
        for state, param, given, start in zip(
            states, (whole, first, rest, stray), (grad, grad[:cut], grad[cut:], grad[cut:]), (0, 0, cut, 0)
        ):
            state.step_at(start, param, given, t, by_definition)
    assert torch.equal(torch.cat([first, rest]), whole)
    for tensor, one, other, wrong in zip(*(state.tensors for state in states)):
        assert torch.equal(torch.cat([one, other]), tensor)
        assert bits == 32 or wrong.dtype == torch.float32 or not torch.equal(wrong, other)
    assert dtype == torch.float32 or not torch.equal(stray, rest)


def test_a_part_that_cuts_a_block_is_refused() -> None:
    state, weight = Moments(8, 512), normal(512)
    with pytest.raises(InputError, match=r"starts are \[64\]; 1 multiples of 256 are wanted"):
        state.step_at(64, weight, normal(512), 1, by_definition=False)
