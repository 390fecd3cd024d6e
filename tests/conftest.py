"""Fixtures that every test may use."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_kernels import native


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--native-library", type=Path, help="run the CPU kernels of this build instead of the installed ones"
    )
    parser.addoption(
        "--threads", type=int, default=1, help="threads of torch and the CPU kernels; 1 lets runs share cores"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    path = config.getoption("--native-library")
    if path is not None:
        installed = native.load()
        if installed is None:
            raise pytest.UsageError(f"--native-library replaces the installed library: {native.why_absent()}")
        installed.take_over(native.open_library(path))


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every kind of device that is present here."""
    return torch.device(request.param)


@pytest.fixture(scope="module")
def plans_once() -> Iterator[None]:
    """Rehearse each workload of a preset once: runs with the same settings have the same plan."""
    command = importlib.import_module("lisa_kernels.plan.command")
    real, made = command.rehearse, {}

    def rehearse(workload: Any, gpu: Any = None) -> Any:
        if not str(workload.model).startswith("preset:"):
            return real(workload, gpu=gpu)
        key = repr((workload, gpu))
        if key not in made:
            made[key] = real(workload, gpu=gpu)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "rehearse", rehearse)
        yield
