"""Every method, way with the embeddings and dtype trains on the device as it does on the CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tolerances import ANOTHER_ORDER_OF_SUMS

from device.training import METHODS, Run, at_rest, train

# A weight of bfloat16 is rounded to either neighbour, and in a short run that is as much as an update.
APART = {"float32": ANOTHER_ORDER_OF_SUMS, "bfloat16": 0.6}
LOSS = {"float32": 1e-4, "bfloat16": 1e-2}
ELSEWHERE = ("lisa-always", "owlore-low-rank", "badam-sampled", "galore", "lora-fa")
CASES = [
    *(("llama", method, dtype) for method in METHODS for dtype in APART),
    *(("qwen2", method, "bfloat16") for method in ELSEWHERE),
    *(("gpt2", method, "float32") for method in ELSEWHERE),
]


def run(family: str, method: str, dtype: str, device: str) -> Run:
    # The methods' own clipping and checkpointing with the one, torch's and none with the other.
    settings: dict[str, Any] = {"checkpointing": True, "max_grad_norm": 1.0} if dtype == "bfloat16" else {}
    return train(family, METHODS[method], device, getattr(torch, dtype), **settings, **at_rest(method, "int8"))


# The tests of both orders compare with it.
on_the_cpu = cache(lambda *case: run(*case, "cpu"))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_run_ends_where_it_does_on_the_cpu(case: tuple[str, str, str]) -> None:
    """All losses, and all weights as a share of their way since the start."""
    cpu, cuda = on_the_cpu(*case), run(*case, "cuda")
    assert cuda.losses == pytest.approx(cpu.losses, rel=LOSS[case[2]])
    for name, weight in cpu.after.items():
        if name.endswith("k_proj.bias"):
            # Shifts all scores of a query alike: its gradient is nothing but roundings.
            continue
        way = float((weight - cpu.before[name]).norm())
        apart = float((cuda.after[name] - weight).norm())
        assert apart <= APART[case[2]] * way, name
