"""How much a run recomputes: as few blocks as memory allows, by its own plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lisa_kernels.errors import InputError, NotRehearsedError
from lisa_kernels.plan.command import plan_run
from lisa_kernels.train.memory import PlannedMemory
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.recomputation import settle_recomputation

QUIET, CPU = Console(quiet=True), torch.device("cpu")


def options(how: Any, **changes: Any) -> FineTuneOptions:
    given = {
        "model": "preset:tiny",
        "data": "stdlib",
        "output": Path("out"),
        "seq_len": 256,
        "dtype": "fp32",
        **changes,
    }
    return FineTuneOptions(**given, gradient_checkpointing=how)


def settled(how: Any, plan: Any = plan_run) -> Any:
    return settle_recomputation(options(how), plan, CPU, QUIET).gradient_checkpointing


@pytest.mark.slow
def test_as_few_blocks_recompute_as_a_size_allows() -> None:
    """One block fewer would not fit; a size for everything recomputes none, one for nothing all."""
    need = {count: plan_run(options(count or False)).needed_bytes for count in (0, 3, 4)}
    all_of_them = plan_run(options(True)).needed_bytes
    assert need[0] > need[3] > need[4] > all_of_them
    assert settled(str(need[4])) == 4
    assert settled(str(need[3] - 1)) == 4
    assert settled(str(need[3])) == 3
    assert settled(str(need[0])) is False
    assert settled("1kB") is True


def test_auto_asks_the_device() -> None:
    """A machine with gigabytes to spare recomputes nothing of a small model."""
    assert settled("auto") is False


@pytest.mark.parametrize("how", [True, False, 3, None])
def test_what_was_said_stands(how: Any) -> None:
    assert settled(how, None) is how


def test_without_a_plan_all_blocks_recompute() -> None:
    def refuses(run: FineTuneOptions) -> PlannedMemory:
        raise NotRehearsedError("no")

    assert settled("auto", refuses) is True
    assert settled("auto", None) is True


@pytest.mark.parametrize(("how", "reason"), [("lots", "'lots' is not a size"), (-1, "is -1; a number of blocks")])
def test_what_says_nothing_is_refused(how: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        dataclasses.replace(options(None), gradient_checkpointing=how)


@pytest.mark.parametrize("how", [False, 0, "auto", "8GB"])
def test_what_waits_in_host_memory_is_recomputed(how: Any) -> None:
    with pytest.raises(InputError, match="both --offload-activations and"):
        dataclasses.replace(options(how), offload_activations=True)
    assert dataclasses.replace(options(3), offload_activations=True).gradient_checkpointing == 3
