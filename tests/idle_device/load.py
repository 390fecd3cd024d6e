"""Compile the device that does nothing, once for each torch and text of it, and load it: before torch is imported."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("idle_device.cpp")
FLAGS = ("-O1", "-std=c++20", "-fPIC", "-shared", "-w")
BUILDS = Path(__file__).parents[2] / "build" / "idle_device"


def compiler() -> str | None:
    """Return the C++ compiler of this machine, None without one."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def torch_folder() -> Path:
    """Return where torch is installed; it is not imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build() -> Path:
    """Return the compiled library; compiles it unless it was compiled from this text against this torch before."""
    torch, text = torch_folder(), SOURCE.read_bytes()
    against = importlib.metadata.version("torch"), torch, sys.platform, FLAGS
    what = hashlib.sha256(text + repr(against).encode()).hexdigest()
    built = BUILDS / f"idle_device-{what[:16]}.so"
    if built.exists():
        return built
    BUILDS.mkdir(parents=True, exist_ok=True)
    # Several processes may be at it: each writes a file of its own, and the last name wins.
    with tempfile.TemporaryDirectory(dir=BUILDS) as folder:
        made = Path(folder) / built.name
        subprocess.run(
            [
                str(compiler()), *FLAGS, f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include",
                "-o", str(made), str(SOURCE), f"-L{torch}/lib", "-lc10", "-ltorch_cpu",
            ],
            check=True,
        )  # fmt: skip
        made.replace(built)
    return built


def load() -> None:
    """Load the device into this process."""
    if "torch" in sys.modules:
        raise RuntimeError("torch asks for devices when it is imported: load the idle one before that.")
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(build()))
