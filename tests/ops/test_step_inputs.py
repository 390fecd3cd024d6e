"""What a step needs besides its tensors: the compiled form equals the definition, group by group and count by count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lisa_kernels import native
from lisa_kernels.ops.adamw8 import Hyper, Scalars, reference, step_inputs, step_scalars
from lisa_kernels.ops.random_bits import key_base, keys_at

USUAL = Hyper(1e-3, 0.9, 0.999, 1e-8, 1e-2)
OTHERS = [
    Hyper(0.0, 0.0, 0.0, 0.0, 0.0),
    Hyper(3e-5, 0.95, 0.9999, 1e-15, 0.3),
    Hyper(1.0, 0.5, 0.999999, 1e-3, 0.0),
    Hyper(1e-45, 0.999, 0.9, 1.0, 1e-6),
]
STEPS = [*range(1, 40), 999, 1000, 123_456, 10**7, 2**53]


def count(step: int) -> Tensor:
    return torch.full((), step, dtype=torch.int64)


def key_bases(k: int) -> Tensor:
    return torch.tensor([key_base(5, index) for index in range(k)], dtype=torch.int64)


def inputs(steps: list[int], groups: list[tuple[Hyper, int]], scale: float = 1.0, clock: int = 7) -> list[Tensor]:
    counts = [count(step) for step in steps]
    return list(step_inputs(counts, groups, torch.full((), scale), key_bases(len(steps)), count(clock)))


def definition(steps: list[int], groups: list[tuple[Hyper, int]], scale: float = 1.0, clock: int = 7) -> list[Tensor]:
    hyper, ends = [value for each, _ in groups for value in each], [end for _, end in groups]
    counts = [count(step) for step in steps]
    bases = key_bases(len(steps))
    return list(reference.step_inputs(counts, torch.full((), scale), bases, count(clock), hyper, ends))


@pytest.mark.parametrize("hyper", [USUAL, *OTHERS], ids=["usual", "zeros", "slow", "fast", "tiny"])
def test_the_operation_equals_its_definition_at_every_count(hyper: Hyper) -> None:
    groups = [(hyper, len(STEPS))]
    for ours, wanted in zip(inputs(STEPS, groups, 0.3), definition(STEPS, groups, 0.3), strict=True):
        assert ours.dtype == wanted.dtype
        assert torch.equal(ours, wanted)


def test_each_group_has_its_own_rates_and_each_parameter_its_own_count() -> None:
    # Groups begin with the count that the one before ended with: its scalars must not be taken over.
    steps, groups = [4, 9, 4, 4, 4, 1, 2**40], [(USUAL, 3), (OTHERS[1], 4), (OTHERS[2], 7)]
    scalars, keys = inputs(steps, groups, 0.5, clock=11)
    owner = [0, 0, 0, 1, 2, 2, 2]
    for row, (step, group) in enumerate(zip(steps, owner)):
        alone = step_scalars(torch.tensor([step]), groups[group][0], torch.tensor(0.5))
        assert torch.equal(scalars[row], alone[0])
    assert torch.equal(keys, keys_at(key_bases(7), count(11)))
    assert not torch.equal(scalars[0], scalars[1])
    assert not torch.equal(scalars[0], scalars[3])
    assert not torch.equal(keys, inputs(steps, groups, clock=12)[1])


def test_the_scalars_follow_the_formulas_in_float64() -> None:
    scalars = Scalars(*inputs([3], [(USUAL, 1)], 0.25)[0][0].tolist())
    correction1, correction2 = 1 - 0.9**3, 1 - 0.999**3
    root = (correction2 / 0.001) ** 0.5
    wanted = Scalars(9.0, 0.1, 999.0, 0.001, 1e-8 * root, 1 - 1e-5, 1e-3 * root * 0.1 / correction1, 0.25)  # type: ignore[arg-type]
    assert scalars == pytest.approx(wanted, rel=1e-7)


def test_a_rate_in_a_tensor_gives_what_its_number_gives() -> None:
    rate = torch.tensor(1e-3, dtype=torch.float64)
    of_tensor = inputs([1, 5], [(USUAL._replace(lr=rate), 2)])
    for ours, wanted in zip(of_tensor, inputs([1, 5], [(USUAL, 2)]), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("rate", [1, np.float32(0.5), np.float64(0.1)], ids=["int", "numpy-32", "numpy-64"])
def test_numbers_of_any_kind_are_taken(rate: float) -> None:
    groups = [[(USUAL._replace(lr=given), 1)] for given in (rate, float(rate))]
    for ours, wanted in zip(*(inputs([3], each) for each in groups), strict=True):
        assert torch.equal(ours, wanted)


def test_the_operation_passes_torchs_own_checks() -> None:
    arguments = ([count(1), count(2)], torch.ones(()), key_bases(2), count(3), [*USUAL, *OTHERS[1]], [1, 2])
    torch.library.opcheck(torch.ops.lisa_kernels.step_inputs, arguments)


@pytest.mark.skipif(native.load() is None, reason=native.why_absent())
def test_the_comparison_is_with_the_compiled_library() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("lisa_kernels::step_inputs", "CPU")
