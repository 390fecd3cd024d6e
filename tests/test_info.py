"""`lisa-kernels info`: what a machine's GPUs are, what they take, and why there is none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from lisa_kernels.cli import main
from lisa_kernels.devices import Card, Machine, Version
from lisa_kernels.info import describe_gpus, gpu_lines, verdict
from lisa_kernels.trial import Trial

T4 = Card("Tesla T4", Version(7, 5), 15_800_000_000)
HERE = Machine(
    "2.14.1+cu130", Version(13, 0), cards=(T4,), driver="580.65.06", runs_cuda=Version(13, 1), visible="2",
)  # fmt: skip
FOUND: dict[str, Any] = {"free_bytes": 9_100_000_000, "auto_dtype": "fp16", "kernels": "all 7"}


def lines(machine: Machine, found: list[dict[str, Any]], limit: int | None) -> list[str]:
    return gpu_lines({**describe_gpus(machine, found), "locked_memory_limit_bytes": limit})


def test_a_card_is_shown_with_what_it_takes() -> None:
    """Card, capability, memory that is free and in all, the dtype of auto, kernels, driver, limits."""
    assert lines(HERE, [FOUND], 8_388_608) == [
        "torch is built for CUDA 13.0; driver 580.65.06 (CUDA 13.1)",
        "cuda:0: Tesla T4, compute capability 7.5, 9.1 of 15.8 GB free; --dtype auto takes fp16; kernels: all 7",
        "CUDA_VISIBLE_DEVICES=2",
        "locked memory (ulimit -l): 8.4 MB",
    ]


def test_a_card_that_no_kernel_runs_on_is_shown_with_the_reason() -> None:
    found = {"free_bytes": 1, "auto_dtype": None, "kernels": "too old"}
    assert "--dtype auto takes none; kernels: too old" in lines(HERE, [found], None)[1]


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (
            Machine("2.13.0+cpu"),
            ["torch is built for CPUs; no NVIDIA driver", "no GPU: torch 2.13.0+cpu is built for CPUs"],
        ),
        (replace(HERE, cards=(), visible=""), ["torch is built for CUDA 13.0", "no GPU: CUDA_VISIBLE_DEVICES is ''"]),
        (
            replace(HERE, cards=(), runs_cuda=Version(12, 0)),
            ["torch is built", "no GPU: the GPU is not used: the NVIDIA"],
        ),
        (Machine("2.13.0+rocm7", rocm="7.0", cards=(T4,)), ["torch is built for ROCm 7.0; no NVIDIA driver", "cuda:0"]),
    ],
)
def test_a_machine_without_a_usable_gpu_is_told_why(machine: Machine, said: list[str]) -> None:
    found = lines(machine, [FOUND] * len(machine.cards), None)
    assert all(line.startswith(start) for line, start in zip(found, said))
    assert found[-1] == "locked memory (ulimit -l): no limit"


def test_kernels_that_fail_are_named() -> None:
    fine = Trial("fold_", 1.5, "")
    assert verdict([fine, fine], triton=True) == "all 2 compile and give the CPU's results (3.0 s)"
    assert verdict([fine], triton=False) == "none without Triton; all 1 operations give the CPU's results (1.5 s)"
    assert verdict([fine, Trial("project", 0.1, "RuntimeError: no")], triton=True) == "project: RuntimeError: no"


def test_json_has_every_fact(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    wanted = {"gpus", "why_no_gpu", "cuda", "driver", "driver_cuda", "visible_devices", "locked_memory_limit_bytes"}
    assert wanted <= set(info)
    assert (info["why_no_gpu"] is None) == bool(info["gpus"])
