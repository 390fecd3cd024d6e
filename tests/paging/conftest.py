"""A driver for stores of unified memory, where there is none."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from lisa_kernels import native
from lisa_kernels.paging import managed

from .driver_stub import StubDriver, build


@pytest.fixture(scope="session")
def built_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled stand-in for CUDA's driver."""
    return build(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def driver(built_driver: Path, tmp_path: Path) -> StubDriver:
    """A stand-in that nothing has called yet."""
    return StubDriver(built_driver, tmp_path / "driver")


@pytest.fixture
def paging_managed(driver: StubDriver, monkeypatch: pytest.MonkeyPatch) -> StubDriver:
    """Let paging="managed" run on the stand-in."""
    if native.load() is None:
        pytest.skip(native.why_absent())
    monkeypatch.setattr(managed, "ManagedStore", functools.partial(managed.ManagedStore, driver.path))
    return driver
