"""What a kernel's run must give: each check runs launches on a machine and fails where they leave the definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import TypeAlias
from unittest import mock

import torch
from tolerances import APPROXIMATE_UPDATE, BFLOAT16_ROUNDING, FLOAT32_ROUNDING, SQUARES_OF_A_TILE
from torch import Tensor

from lisa_kernels.ops.adamw8 import Hyper, reference, step_scalars
from lisa_kernels.ops.blockwise8 import reference as codec
from lisa_kernels.ops.random_bits import (
    STOCHASTIC_ROUNDINGS,
    key_base,
    keys_at,
    moment_bits,
    random_words,
    weight_bits,
)
from lisa_kernels.ops.tiles import COUNT_COLUMN, Launch

from .kernel_runs import Machine, Poisoned

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
HYPER = Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2)
# Of weights of 16 bits, at most this share may lie so near a rounding edge that an approximate root decides: updates
# differ by 2 · 15 roundings of float32, up to 30 of the 65,536 places between two neighbours in bfloat16, 8,192 in
# float16, where nothing cancels; tenfold.
NEAR_AN_EDGE = 300 / 8192

# Weights, then m's codes and absmax and v's, or m and v in float32: a list each.
State: TypeAlias = tuple[list[Tensor], ...]


def bits(tensor: Tensor) -> Tensor:
    """Reinterpret as integers, so that equality tells −0 from 0."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_equal_bits(ours: Tensor, expected: Tensor, what: str) -> None:
    """Fail unless two tensors, of which ours may be on a GPU, are the same."""
    unequal = bits(ours.cpu()) != bits(expected)
    places = unequal.nonzero().flatten().tolist()
    assert not places, f"{len(places)} of {unequal.numel()} {what} differ in their bits, the first at {places[0]}"


def normal(n: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    """Values whose scale changes by up to five decades every hundred elements."""
    generator = torch.Generator().manual_seed(seed)
    decades = torch.rand(-(-n // 100), generator=generator).repeat_interleave(100)[:n] * 5 - 4
    return (torch.randn(n, generator=generator) * 10**decades).to(dtype)


EXTREMES = {
    "denormals": normal(1000, 5) * 1e-41,
    "1e18": normal(1000, 5).clamp(-10, 10) * 1e18,
    "zeros": torch.zeros(1000),
    "minus zeros": -torch.zeros(1000),
    "one value": torch.zeros(1000).index_fill(0, torch.tensor([333]), 0.25),
    "all scales": 10 ** torch.linspace(-44, 18, 1000),
}


@dataclass(frozen=True)
class Step:
    """One step's inputs besides the state: rows of scalars and keys differ from tensor to tensor."""

    grads: list[Tensor]
    scalars: Tensor
    keys: Tensor
    skip: Tensor

    def on(self, memory: Poisoned) -> Step:
        """Return a copy on the device of a memory."""
        scalars, keys, skip = (t.to(memory.device) for t in (self.scalars, self.keys, self.skip))
        return Step(memory.place(self.grads), scalars, keys, skip)


def step_of(grads: list[Tensor], number: int, hyper: Hyper = HYPER, skip: bool = False) -> Step:
    """Return step `number`, of which each tensor has taken one more than the tensor before it."""
    bases = torch.tensor([key_base(3, row) for row in range(len(grads))], dtype=torch.int64)
    scalars = step_scalars(torch.arange(len(grads)) + number, hyper, torch.tensor(0.7))
    return Step(grads, scalars, keys_at(bases, torch.tensor(number + 7)), torch.tensor(skip))


@dataclass(frozen=True)
class Case:
    """Some steps on some tensors; dtypes are taken in turn.

    block_size: None for moments of 32 bits. shift: elements that each tensor lies behind an aligned place. start: the
    index of each tensor's first element, in a larger tensor of which the rest is not there. values: gradients of all
    steps.
    """

    sizes: Sequence[int]
    params: Sequence[torch.dtype] = (FP32,)
    grads: Sequence[torch.dtype] = (FP32,)
    block_size: int | None = 256
    stochastic: bool = True
    hypers: Sequence[Hyper] = (HYPER, HYPER)
    shift: int = 0
    start: int = 0
    values: Sequence[Tensor] | None = field(default=None, repr=False)

    def state(self) -> State:
        """Return weights and zero moments."""
        weights = [normal(n, 1 + k, self.params[k % len(self.params)]) for k, n in enumerate(self.sizes)]
        if self.block_size is None:
            return weights, [torch.zeros(n) for n in self.sizes], [torch.zeros(n) for n in self.sizes]
        blocks = [-(-n // self.block_size) for n in self.sizes]
        codes = [[torch.zeros(n, dtype=torch.uint8) for n in self.sizes] for _ in "mv"]
        absmax = [[torch.zeros(n) for n in blocks] for _ in "mv"]
        return weights, codes[0], absmax[0], codes[1], absmax[1]

    def steps(self, skip: bool = False) -> list[Step]:
        """Return the steps, with gradients that are drawn anew in each."""
        steps = []
        for number, hyper in enumerate(self.hypers, start=1):
            dtypes = [self.grads[k % len(self.grads)] for k in range(len(self.sizes))]
            drawn = [normal(n, 100 * number + k) for k, n in enumerate(self.sizes)]
            grads = [grad.to(dtype) for grad, dtype in zip(self.values or drawn, dtypes)]
            steps.append(step_of(grads, number, hyper, skip))
        return steps


def launches_of(case: Case, machine: Machine, state: State, step: Step) -> list[Launch]:
    """Return the launches of a step."""
    kernels, inputs = machine.module("adamw8"), (step.scalars, step.keys, step.skip)
    given, options = (state[0], step.grads, *state[1:], *inputs), (case.stochastic, machine.warp)
    if case.block_size is None:
        launches: list[Launch] = kernels.adamw32_launches(*given, *options)
    else:
        launches = kernels.adamw8_launches(*given, case.block_size, *options)
    return launches if case.start == 0 else [_begin_at(launch, case.start) for launch in launches]


def elements_of(launch: Launch) -> int:
    """Return how many elements a program works on."""
    names = ("ROWS", "LANES", "VECTOR", "STEPS", "PASSES")
    return prod(launch.constants[name] for name in names)


def _begin_at(launch: Launch, start: int) -> Launch:
    """Let a launch's tiles begin `start` elements later."""
    first, rest = divmod(start, elements_of(launch))
    assert rest == 0
    if "work" in launch.arguments:
        later = {"work": launch.arguments["work"] + first}
    else:
        later = {"first_tile": launch.arguments["first_tile"] + first, "count": launch.arguments["count"] + start}
    return replace(launch, arguments={**launch.arguments, **later})


def displaced(case: Case) -> dict[int | str, int]:
    """Return by how many bytes addresses must lie earlier for tensors to begin at `start`, by column and by name."""
    absmax = 0 if case.block_size is None else case.start // case.block_size * 4
    moments = [4 * case.start] * 2 if case.block_size is None else [case.start, absmax] * 2
    every = [case.params[0].itemsize * case.start, case.grads[0].itemsize * case.start, *moments]
    names = ("param", "grad", "m_codes", "m_absmax", "v_codes", "v_absmax")
    # The count becomes larger by as much.
    return {**dict(enumerate(every)), **dict(zip(names, every)), COUNT_COLUMN: -case.start}


def reference_step(case: Case, state: State, step: Step) -> None:
    """Take a step as the definition does."""
    later = partial(_words_from, case.start)
    given = (state[0], step.grads, *state[1:], step.scalars, step.keys, step.skip)
    with mock.patch.object(reference, "random_words", later):
        if case.block_size is None:
            reference.adamw32_(*given, case.stochastic)
        else:
            reference.adamw8_(*given, case.block_size, case.stochastic)


def _words_from(offset: int, key: Tensor, start: int, count: int) -> Tensor:
    return random_words(key, offset + start, count)


def copy_of(state: State) -> State:
    """Return a copy in the host's memory."""
    return tuple([tensor.cpu().clone() for tensor in tensors] for tensors in state)


def check_steps(case: Case, machine: Machine) -> tuple[State, State]:
    """Take a case's steps on a machine; moments equal the definition's bit for bit, weights as far as roots allow.

    The definition's moments are never synchronised with the machine's; each step of weights begins where the
    machine's ended. Returns the machine's state and the definition's, of which weights were never synchronised either.
    """
    expected, memory = case.state(), Poisoned(machine.device, case.shift)
    ours: State = tuple(memory.place(tensors) for tensors in expected)
    for step in case.steps():
        weights = copy_of(ours[:1])[0]
        bounds = [weight_bounds(case, (weights, *expected[1:]), step, row) for row in range(len(weights))]
        there = step.on(memory)
        machine.run(launches_of(case, machine, ours, there), memory.tensors, displaced(case) if case.start else None)
        reference_step(case, expected, step)
        for number, (mine, theirs) in enumerate(zip(ours[1:], expected[1:]), start=1):
            for row, (one, other) in enumerate(zip(mine, theirs)):
                assert_equal_bits(one, other, f"{moment_name(case, number)} of tensor {row}")
        for row, (weight, (low, high)) in enumerate(zip(copy_of(ours[:1])[0], bounds)):
            assert_between(weight, low, high, row)
        for before, after in zip(step.grads, there.grads):
            assert_equal_bits(after, before, "gradients, which are only read,")
        memory.assert_untouched()
    return copy_of(ours), expected


def moment_name(case: Case, number: int) -> str:
    """Return what one list of a state holds."""
    names = ("m", "v") if case.block_size is None else ("codes of m", "absmax of m", "codes of v", "absmax of v")
    return names[number - 1]


def weight_bounds(case: Case, state: State, step: Step, row: int) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest weights of one tensor that the GPU's approximate roots allow, in its dtype.

    A float32 weight of zero becomes minus its update; what differs is the update, and all that follows is monotone.
    """
    weight = state[0][row]
    alone: State = ([torch.zeros(weight.shape)], *([moment[row].clone()] for moment in state[1:]))
    one = replace(step, grads=[step.grads[row]], scalars=step.scalars[row : row + 1], keys=step.keys[row : row + 1])
    reference_step(case, alone, one)
    scalars = reference.Scalars(*step.scalars[row].unbind())
    decayed = (weight.to(FP32) * scalars.decay).to(torch.float64)
    update = -alone[0][0].to(torch.float64)
    # Below the normal numbers a product errs by a half of the smallest one, however small it is itself.
    error = update.abs() * APPROXIMATE_UPDATE + 2.0**-147 * (scalars.step_size != 0)
    ends = decayed - update - error, decayed - update + error
    if case.stochastic and weight.dtype != FP32:
        bits16 = weight_bits(random_words(step.keys[row], case.start, weight.numel()))
        low, high = (STOCHASTIC_ROUNDINGS[weight.dtype](end.to(FP32), bits16) for end in ends)
    else:
        low, high = (end.to(FP32).to(weight.dtype) for end in ends)
    return low, high


def assert_between(weight: Tensor, low: Tensor, high: Tensor, row: int) -> None:
    """Fail if a weight is outside its bounds, or if the bounds are too wide to say anything."""
    outside = ~((low <= weight) & (weight <= high))
    assert not outside.any(), f"{int(outside.sum())} of {outside.numel()} weights of tensor {row} are out of bounds"
    if weight.dtype != FP32:
        open_ones = int((low != high).sum())
        assert open_ones <= 1 + NEAR_AN_EDGE * weight.numel(), f"{open_ones} weights of tensor {row} are not checked"


def check_without_epsilon(machine: Machine, grad: Tensor, block_size: int | None) -> None:
    """Take a first step with ε = 0: it moves a weight by its rate at most, however small the gradient."""
    case = Case(grad.shape * 2, block_size=block_size, hypers=(HYPER._replace(eps=0.0),), values=[grad] * 2)
    before, memory = case.state(), Poisoned(machine.device)
    ours: State = tuple(memory.place(tensors) for tensors in before)
    step = case.steps()[0]
    machine.run(launches_of(case, machine, ours, step.on(memory)), memory.tensors)
    for row, (weight, old) in enumerate(zip(copy_of(ours)[0], before[0])):
        scalars = reference.Scalars(*step.scalars[row].unbind())
        far = ~((weight - old * scalars.decay).abs() <= 1.01 * HYPER.lr)
        assert not far.any(), f"{int(far.sum())} weights of tensor {row} leapt"


def schedule(steps: int) -> list[Hyper]:
    """Return hyper-parameters each of which changes from step to step."""
    parts = [k / steps for k in range(steps)]
    return [Hyper(2e-2 * (1 - x), 0.9 - 0.2 * x, 0.999 - 0.05 * x, 10 ** (-8 + 2 * x), 0.1 * x) for x in parts]


def train(case: Case, machine: Machine | None) -> list[Tensor]:
    """Fit noisy targets by a case's steps on a machine or, with None, by the definition; return the weights.

    Gradients are those of a quadratic, with noise, at the trajectory's own weights; nothing is ever synchronised.
    """
    device = torch.device("cpu") if machine is None else machine.device
    memory = Poisoned(device)
    state: State = tuple(memory.place(tensors) for tensors in case.state())
    curvature = [10 ** (torch.rand(n, generator=torch.Generator().manual_seed(n)) * 3 - 3) for n in case.sizes]
    for number, hyper in enumerate(case.hypers, start=1):
        grads = []
        for row, (weight, curve) in enumerate(zip(copy_of(state[:1])[0], curvature)):
            noise = torch.randn(curve.shape, generator=torch.Generator().manual_seed(1000 * number + row))
            grads.append((curve * (weight.to(FP32) + 0.1 * noise)).to(case.grads[row % len(case.grads)]))
        inputs = Poisoned(device)
        step = step_of(grads, number, hyper).on(inputs)
        if machine is None:
            reference_step(case, state, step)
        else:
            machine.run(launches_of(case, machine, state, step), [*memory.tensors, *inputs.tensors])
    memory.assert_untouched()
    return copy_of(state[:1])[0]


def check_training(case: Case, machine: Machine) -> None:
    """Train by the definition and on a machine: 19 of 20 weights end together, the others a few steps apart at most.

    Together: float32 to the bound of an update and two roundings of the weight in each step; bfloat16 in all bits. One
    that once fell on the other side of a rounding edge, its own or that of a code, is a place of bfloat16 or an eighth
    of an update away, and then follows its own gradients.
    """
    steps = len(case.hypers)
    largest_rate = max(float(hyper.lr) for hyper in case.hypers)
    for row, (ours, expected) in enumerate(zip(train(case, machine), train(case, None))):
        apart = (ours.double() - expected.double()).abs()
        size = float(expected.abs().max())
        bound = steps * (APPROXIMATE_UPDATE * largest_rate * 3 + 2 * FLOAT32_ROUNDING * size)
        if ours.dtype == BF16:
            bound = 0.0
        astray = int((apart > bound).sum())
        assert astray <= ours.numel() // 20, f"{astray} of {ours.numel()} weights of tensor {row} went astray"
        assert float(apart.max()) <= 4 * (largest_rate + BFLOAT16_ROUNDING * size), f"a weight of tensor {row} is lost"


def check_codec(
    machine: Machine, values: Tensor, signed: bool, block_size: int, key: Tensor | None, shift: int = 0
) -> None:
    """Encode and decode float32 values: codes, absmax and values equal the definition's bit for bit."""
    memory, kernels = Poisoned(machine.device, shift), machine.module("blockwise8")
    bits20 = None if key is None else moment_bits(random_words(key, 0, values.numel()), signed)
    expected = codec.quantize(values, signed, block_size, bits20)
    [given] = memory.place([values])
    codes, absmax = (memory.empty(tensor) for tensor in expected)
    there = None if key is None else key.to(machine.device)
    machine.run([kernels.quantize_launch(given, codes, absmax, signed, block_size, there, machine.warp)])
    assert_equal_bits(codes, expected[0], "codes")
    assert_equal_bits(absmax, expected[1], "absmax")
    decoded = memory.empty(values)
    machine.run([kernels.dequantize_launch(codes, absmax, decoded, signed, block_size, machine.warp)])
    assert_equal_bits(decoded, codec.dequantize(*expected, signed, block_size), "decoded values")
    assert_equal_bits(given, values, "values, which are only read,")
    memory.assert_untouched()


def check_reciprocal(machine: Machine, count: int, values: Tensor | None = None) -> None:
    """Take reciprocals of `count` random numbers of [2**-120, inf] and of awkward ones, or of `values`."""
    from . import probe_kernels

    if values is None:
        ends = torch.tensor([2.0**-120, 2.0**126, 2.0**127, 3.4028234663852886e38, float("inf"), 1.0, 2.0])
        powers = torch.arange(7 << 23, 255 << 23, 1 << 23, dtype=torch.int32)
        near = torch.cat([powers + 1, powers[1:] - 1, powers + 2]).view(FP32)
        drawn = torch.randint(7 << 23, 255 << 23, (count,), generator=torch.Generator().manual_seed(1))
        values = torch.cat([ends, near, drawn.to(torch.int32).view(FP32)])
        values = torch.cat([values, torch.ones(-values.numel() % probe_kernels.BLOCK)])
    memory = Poisoned(machine.device)
    [given] = memory.place([values])
    results = memory.empty(values)
    machine.run([probe_kernels.apply_launch(machine.module("blockwise8").reciprocal, given, results)])
    assert_equal_bits(results, values.reciprocal(), "reciprocals")


def check_norm(machine: Machine, grads: list[Tensor], squares: bool = True, shift: int = 0) -> None:
    """Measure gradients: the largest magnitude exactly, the sum of squares to the roundings of sums of 4096.

    A float32 sum over a tile of 4096, of which a thread adds up to 32 and a tree the rest, takes up to 39 roundings;
    the scaling is exact and the square one more.
    """
    memory, kernels = Poisoned(machine.device, shift), machine.module("grad_norm")
    there = memory.place(grads)
    launches = kernels.grad_norm_launches(there, squares, machine.warp)
    for launch in launches:
        launch.arguments["largest"].fill_(float("nan"))
        if squares:
            launch.arguments["squares"].fill_(float("nan"))
    machine.run(launches, memory.tensors)
    largest, total = kernels.combine(launches, machine.device).tolist()
    magnitudes = torch.cat([grad.to(torch.float64) for grad in grads]).abs()
    exact = float(magnitudes.max()), float(magnitudes.square().sum()) if squares else 0.0
    assert largest == exact[0] or (largest != largest and exact[0] != exact[0])
    if exact[0] < float("inf"):
        assert abs(total - exact[1]) <= SQUARES_OF_A_TILE * exact[1]
    memory.assert_untouched()
