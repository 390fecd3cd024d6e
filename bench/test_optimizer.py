"""The cases of `lisa-kernels bench optimizer` for pytest-benchmark: `pytest bench/ --benchmark-group-by=group`."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from bench.command import parse_device
from bench.held_bytes import state_bytes
from bench.optimizer_cases import Case, Entry, start, why_not
from bench.optimizer_table import size_name
from bench.peers import CONTESTANTS, DTYPES
from bench.timing import seconds_per_call

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: pip install 'lisa_kernels[bench]'")

SIZES = (1 << 12, 1 << 16, 1 << 20)
ROUNDS = 10
ENTRIES = [Entry(contestant, dtype) for dtype in DTYPES for contestant in CONTESTANTS.values()]


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=size_name)
def test_step(size: int, entry: Entry, benchmark: Any) -> None:
    """A whole optimizer.step(); on a GPU with the wait for its end, which the command's events leave out."""
    case = Case(parse_device("auto"), size)
    if reason := why_not(entry, case):
        pytest.skip(reason)
    running = start(entry, case, case.params(DTYPES[entry.dtype]), ROUNDS)
    if isinstance(running, str):
        pytest.skip(running)
    benchmark.group = f"{size_name(size)} elements on {case.device}"
    benchmark.extra_info["state_bytes_per_element"] = state_bytes(running.optimizer) / case.elements
    # The clock waits for a GPU's end; a CPU's step has ended when it returns.
    step = functools.partial(seconds_per_call, running.optimizer.step, case.device)
    benchmark.pedantic(step, rounds=running.rounds, iterations=running.steps_per_round)
