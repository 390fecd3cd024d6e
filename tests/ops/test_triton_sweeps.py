"""The compiled kernels on all targets, dtypes and blocks: what takes longer than a plain run may."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lisa_kernels.ops.random_bits import key_base, keys_at

from .kernel_checks import (
    BF16,
    FP16,
    FP32,
    HYPER,
    Case,
    check_codec,
    check_norm,
    check_reciprocal,
    check_steps,
    check_training,
    normal,
    schedule,
)
from .kernel_runs import MACHINES, Machine

pytestmark = pytest.mark.slow

# A whole tile and a vector's part of one, twice each, so that every launch is one over a table; and odd ends.
SIZES = (1, 255, 256, 257, 264, 4095, 4096, 4097)
# sm_89 has the code of sm_86 (tests/test_kernel_code.py).
ALL = [Machine(sm) for sm in (80, 86, 90, 100, 120)] + [machine for machine in MACHINES if machine.sm is None]
WIDE = [machine for machine in ALL if machine.sm not in (100, 120)]
FUZZED = [Machine(90, fuzz=seed) for seed in range(3)]
DTYPES = (FP32, BF16, FP16)
KEY = keys_at(torch.tensor([key_base(3, 2)]), torch.tensor(8))[0]

on_all = pytest.mark.parametrize("machine", ALL, ids=str)
on_wide = pytest.mark.parametrize("machine", WIDE, ids=str)
fuzzed = pytest.mark.parametrize("machine", FUZZED, ids=lambda machine: f"errors-{machine.fuzz}")
MOMENTS = pytest.mark.parametrize("block_size", [256, None], ids=["8 bits", "32 bits"])


def pairs(dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...]) -> dict[str, tuple[object, ...]]:
    """Every size for every pair of dtypes of weight and gradient."""
    combinations = [(param, grad) for param, grad in product(dtypes, dtypes) for _ in sizes]
    params, grads = zip(*combinations)
    return {"sizes": sizes * len(dtypes) ** 2, "params": params, "grads": grads}


@on_all
@MOMENTS
def test_steps_at_every_size(machine: Machine, block_size: int | None) -> None:
    """Weights and gradients in float32, or both in bfloat16."""
    dtypes = (FP32,) * len(SIZES) + (BF16,) * len(SIZES)
    check_steps(Case(SIZES * 2, dtypes, dtypes, block_size=block_size), machine)


@on_wide
@MOMENTS
def test_every_pair_of_dtypes(machine: Machine, block_size: int | None) -> None:
    """One list holds them all; on one target with whole tiles and odd ends."""
    sizes = (264,) if machine.sm in (80, 86) else (264, 4097, 255)
    check_steps(Case(**pairs(DTYPES, sizes), block_size=block_size), machine)


@on_wide
@pytest.mark.parametrize("block_size", [16, 64, 2048, 8192])
def test_every_block_size(machine: Machine, block_size: int) -> None:
    """And to nearest on one target."""
    for stochastic in (True, False)[: 2 if machine.sm == 90 else 1]:
        check_steps(Case((2 * 8192 + 264, 300, 257), (BF16,), (BF16,), block_size, stochastic), machine)


@fuzzed
@MOMENTS
def test_errors_of_approximate_instructions(machine: Machine, block_size: int | None) -> None:
    """Several draws of the errors, all dtypes."""
    check_steps(Case(**pairs(DTYPES, (264, 4097, 255)), block_size=block_size, hypers=(HYPER,) * 3), machine)


@pytest.mark.parametrize("machine", [Machine(80), *MACHINES, FUZZED[0]], ids=lambda m: f"{m}-errors-{m.fuzz}")
@MOMENTS
def test_a_hundred_steps_of_training(machine: Machine, block_size: int | None) -> None:
    """Never synchronised; with errors of approximate instructions too."""
    check_training(Case((264, 264), DTYPES[:2], DTYPES[:2], block_size, hypers=schedule(100)), machine)


@on_all
def test_the_other_kernels(machine: Machine) -> None:
    """Codec, norm and reciprocal."""
    for signed in (True, False):
        for n, block_size in ((4097, 256), (4096, 256)):
            values = normal(n, n) if signed else normal(n, n).abs()
            check_codec(machine, values, signed, block_size, KEY)
    check_norm(machine, [normal(n, n, dtype) for n in SIZES for dtype in DTYPES])
    check_reciprocal(machine, 1 << 12)
