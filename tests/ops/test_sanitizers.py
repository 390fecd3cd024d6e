"""Builds of the C++ library that report bad memory accesses, undefined steps and races pass its tests, and report none.

The interpreter and torch are not built with a sanitizer: its runtime is loaded before them, and only what the kernels
do is watched. The build for races uses threads of C++ instead of OpenMP's, whose runtime the sanitizer cannot follow.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from lisa_kernels import native

ROOT = Path(__file__).parents[2]
OPS = [f"tests/ops/test_{name}.py" for name in ("adamw8", "blockwise8", "cpu_kernels", "fold", "fuzz", "grad_norm")]
KERNELS, MANAGED = "tests/ops/test_cpu_kernels.py", "tests/paging/test_managed.py"
BUILD_SECONDS, RUN_SECONDS = 600, 1200


class Sanitizer(NamedTuple):
    """A kind of build: what `-fsanitize=` takes, the runtimes to load first, and their settings."""

    flag: str
    runtimes: tuple[str, ...]
    settings: dict[str, str]


MEMORY = Sanitizer(
    "address,undefined",
    ("libasan.so", "libubsan.so"),
    # The interpreter never frees all it has.
    {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
)
# torch's own threads synchronise where the sanitizer does not see it: its accesses are left out, ours are not.
RACES = Sanitizer("thread", ("libtsan.so",), {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1"})
SANITIZERS = pytest.mark.parametrize("sanitizer", [MEMORY, RACES], ids=["memory", "races"])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.load() is None, reason=native.why_absent()),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake to build the library with"),
]


def environment(sanitizer: Sanitizer) -> dict[str, str]:
    """Return the variables for a process that loads the runtimes first; skip where the compiler has none to load."""
    paths = []
    for name in sanitizer.runtimes:
        asked = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        paths.append(asked.stdout.strip())
        if not Path(paths[-1]).is_absolute():
            pytest.skip(f"the compiler has no {name}")
    variables = {**os.environ, **sanitizer.settings, "LD_PRELOAD": ":".join(paths)}
    started = subprocess.run([sys.executable, "-c", ""], env=variables, capture_output=True, text=True, check=False)
    if started.returncode:
        pytest.skip(f"no process starts with the runtime of -fsanitize={sanitizer.flag}: {started.stderr[:200]}")
    return variables


def build(sanitizer: Sanitizer, source: Path, folder: Path, *options: str) -> Path:
    """Build the library in `folder`; return the file."""
    configure = ["cmake", "-S", str(source), "-B", str(folder), f"-DLISA_SANITIZE={sanitizer.flag}", *options]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / native.FILE_NAME


def run_tests(library: Path, variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--threads", "2"]
    # A report goes to the process's own standard error, and ends it.
    command += ["--capture", "sys"]
    return subprocess.run(
        [*command, "--native-library", str(library), *arguments],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=RUN_SECONDS, check=False,
    )  # fmt: skip


@SANITIZERS
def test_the_library_is_clean(sanitizer: Sanitizer, tmp_path: Path) -> None:
    """With warnings as errors, and every instruction set that this machine has."""
    variables = environment(sanitizer)
    finished = run_tests(build(sanitizer, ROOT / "csrc", tmp_path, "-DLISA_STRICT=ON"), variables, *OPS, MANAGED)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


def overlapping_parts(source: str) -> str:
    return source.replace("part_end = start_of(part + 1);", "part_end = total;")


def unpadded_ends(source: str) -> str:
    return source.replace("const bool is_whole = block.count % kUnit == 0;", "const bool is_whole = true;")


def unlocked_memory(source: str) -> str:
    return source.replace("const std::lock_guard<std::mutex> lock(mutex_);", "")


@pytest.mark.parametrize(
    ("sanitizer", "file", "mutate", "report", "tests"),
    [
        (RACES, "api.cpp", overlapping_parts, "data race", (KERNELS, "same_bits or every_size")),
        (MEMORY, "adamw.h", unpadded_ends, "heap-buffer-overflow", (KERNELS, "same_bits or every_size")),
        (RACES, "managed.cpp", unlocked_memory, "data race", (MANAGED, "threads")),
    ],
    ids=["two-threads-on-one-block", "ends-not-padded", "memory-not-locked"],
)
def test_a_fault_is_caught(
    sanitizer: Sanitizer, file: str, mutate: Callable[[str], str], report: str, tests: tuple[str, str], tmp_path: Path
) -> None:
    """Negative controls: deliberately broken copies of the source, one instruction set for speed."""
    variables = environment(sanitizer)
    source = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    text = (source / file).read_text()
    assert mutate(text) != text
    (source / file).write_text(mutate(text))
    library = build(sanitizer, source, tmp_path / "build", "-DLISA_X86_64=OFF")
    finished = run_tests(library, variables, tests[0], "-k", tests[1])
    assert finished.returncode != 0
    assert report in finished.stdout + finished.stderr
