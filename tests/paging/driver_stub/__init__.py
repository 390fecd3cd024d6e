"""A stand-in for CUDA's driver: built once, loaded afresh for each test, and told what to fail."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
# As CMake looks for one.
COMPILERS = ("c++", "g++", "clang++")
EVERY_CALL = -1
# What the driver says of a call that was told to fail.
TOLD = "failed with error 999: told to fail"


def compile_source(name: str, *options: str) -> None:
    """Compile a source of this folder, warnings being errors; skips where there is no compiler."""
    compiler = next(filter(shutil.which, [os.environ.get("CXX", ""), *COMPILERS]), None)
    if compiler is None:
        pytest.skip(f"no C++ compiler ({', '.join(COMPILERS)}) for the stand-in for CUDA's driver")
    command = [compiler, "-Wall", "-Wextra", "-Werror", str(FOLDER / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def build(folder: Path) -> Path:
    """Return the stand-in, compiled into `folder`."""
    library = folder / "libcuda.so.1"
    compile_source("driver.cpp", "-std=c++17", "-shared", "-fPIC", "-o", str(library))
    return library


class StubDriver:
    """A copy of the built library with a state of its own: nothing called, nothing retained, nothing to fail.

    without: functions that it does not have.
    """

    def __init__(self, built: Path, folder: Path, without: tuple[str, ...] = ()) -> None:
        content = built.read_bytes()
        for name in without:
            symbol = b"\0" + name.encode() + b"\0"
            assert symbol in content
            content = content.replace(symbol, b"\0XX" + symbol[3:])
        folder.mkdir(exist_ok=True)
        self.path = str(folder / built.name)
        Path(self.path).write_bytes(content)
        self._library = ctypes.CDLL(self.path)
        self._library.stub_log.restype = ctypes.c_char_p

    def fail(self, function: str, nth: int = 1) -> None:
        """Let the nth call of a function from now on fail, or with EVERY_CALL each, or with 0 none."""
        self._library.stub_fail(function.encode(), nth)

    def set_attribute(self, attribute: int, value: int) -> None:
        """Set an attribute of the device; all others are 1."""
        self._library.stub_set_attribute(attribute, value)

    def calls(self, function: str) -> int:
        """Return how often a function was called."""
        return int(self._library.stub_calls(function.encode()))

    def log(self) -> list[str]:
        """Return all calls so far, with what matters of their arguments."""
        return self._library.stub_log().decode().splitlines()

    @property
    def live(self) -> int:
        """How many allocations are not freed."""
        return int(self._library.stub_live())

    @property
    def retained(self) -> int:
        """How often the device's context is held."""
        return int(self._library.stub_retained())

    @property
    def is_current(self) -> bool:
        """Whether this thread was left with the device's context."""
        return bool(self._library.stub_current())
