"""What people install: the wheel and the source distribution, each in a fresh environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command: object, **more: Any) -> str:
    """Return what a command prints; its error output is shown where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


def installed(folder: Path, distribution: Path, **environment: str) -> dict[str, Any]:
    """Install into a fresh environment that sees this one's other packages; return what `info` says there."""
    venv.create(folder, with_pip=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # A path, not this environment itself: what is installed here in place stays out of sight.
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    python = folder / "bin" / "python"
    more = {"env": {**os.environ, **environment}, "cwd": folder}
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", distribution, **more)
    where = run(python, "-c", "import lisa_kernels; print(lisa_kernels.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(site)
    described: dict[str, Any] = json.loads(run(folder / "bin" / "lisa-kernels", "info", "--json", cwd=folder))
    return described


def kernels(described: dict[str, Any]) -> dict[str, str]:
    return {row["op"]: row["kernel"] for row in described["kernels"]}


@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is for Linux")
def test_the_wheel_becomes_manylinux(built: Path, tmp_path: Path) -> None:
    """One wheel for every Python: auditwheel takes it, with the OpenMP runtime that it needs inside."""
    (wheel,) = built.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    auditwheel = Path(sys.executable).parent / "auditwheel"
    run(auditwheel, "repair", "--wheel-dir", tmp_path, wheel, env={**os.environ, "PATH": path})
    (repaired,) = tmp_path.glob("*.whl")
    assert "-py3-none-manylinux_" in repaired.name
    assert kernels(installed(tmp_path / "env", repaired))["adamw8_"].startswith("C++")


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake to build with")
def test_the_sources_install_without_a_compiler(built: Path, tmp_path: Path) -> None:
    """Nothing is compiled then, and every operation runs on its definition."""
    (sources,) = built.glob("*.tar.gz")
    described = installed(tmp_path / "env", sources, CXX=str(tmp_path / "no-compiler"))
    assert set(kernels(described).values()) == {"PyTorch"}
