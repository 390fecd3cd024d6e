"""The compiled library of CPU kernels: where it is found, and its C interface as `csrc/api.h` declares it.

A library that is absent is no error: the PyTorch definitions run in its place. One that is present but cannot be
loaded, or is of another version, raises, because a silent fallback would cost a factor of a hundred.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from lisa_kernels.errors import InputError

ABI_VERSION = 1
FILE_NAME = "liblisa_kernels.dylib" if sys.platform == "darwin" else "liblisa_kernels.so"
INSTRUCTION_SETS = ("baseline", "AVX2", "AVX-512")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_REINSTALL = "Reinstall the package with a C++ compiler present: pip install --force-reinstall --no-deps lisa_kernels"


class Scalars(Structure):
    """Scalars of one AdamW step, each rounded to float32."""

    _fields_ = [
        (name, c_float)
        for name in (
            "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps",
            "decay", "step_size", "root_correction2", "grad_scale",
        )
    ]  # fmt: skip


class Stream(Structure):
    """What keys the random numbers of one tensor at one step."""

    _fields_ = [("seed", c_int64), ("parameter", c_int64), ("clock", c_int64)]


_SIGNATURES: dict[str, list[object]] = {
    "adamw8": [*[c_void_p] * 6, c_int64, c_int64, POINTER(Scalars), POINTER(Stream), *[c_int32] * 5],
    "adamw32": [*[c_void_p] * 4, c_int64, POINTER(Scalars), POINTER(Stream), *[c_int32] * 5],
    "quantize_blockwise": [*[c_void_p] * 3, c_int64, c_int64, c_int32, c_int32, c_uint64, c_int32, c_int32],
    "dequantize_blockwise": [*[c_void_p] * 3, c_int64, c_int64, *[c_int32] * 3],
    "fold": [c_void_p, c_void_p, c_int64, c_int64, c_float, POINTER(Stream), *[c_int32] * 4],
}


@dataclass(frozen=True)
class Library:
    """The loaded library and the instruction set its kernels are asked to use, an index of `INSTRUCTION_SETS`."""

    path: Path
    functions: dict[str, ctypes._NamedFuncPointer]
    instruction_set: int

    def call(self, name: str, *arguments: object) -> None:
        """Run one function on as many threads as torch uses; the results do not depend on how many those are."""
        self.functions[name](*arguments, torch.get_num_threads(), self.instruction_set)


def _candidates() -> list[Path]:
    """Return where the library may be: beside the package, or (editable installs) among the distribution's files."""
    paths = [Path(__file__).parent / FILE_NAME]
    try:
        installed = metadata.files("lisa_kernels") or []
    except metadata.PackageNotFoundError:
        installed = []
    return paths + [Path(str(file.locate())) for file in installed if file.name == FILE_NAME]


def open_library(path: Path) -> Library:
    """Load the library at `path`; RuntimeError where it cannot be loaded or has another version of the interface."""
    try:
        library = ctypes.CDLL(str(path))
        version = library.lisa_kernels_abi_version
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"{path} is not a usable library of CPU kernels ({error}). {_REINSTALL}") from error
    if version() != ABI_VERSION:
        raise RuntimeError(
            f"{path} has version {version()} of the C interface and this package needs {ABI_VERSION}: "
            f"it was built from other sources. {_REINSTALL}"
        )
    functions = {}
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, f"lisa_kernels_{name}")
        function.argtypes, function.restype = arguments, None
        functions[name] = function
    return Library(path, functions, library.lisa_kernels_best_instruction_set())


@lru_cache(maxsize=1)
def load() -> Library | None:
    """Return the library, or None where none is installed; see `why_absent`."""
    for path in _candidates():
        if path.exists():
            return open_library(path)
    return None


def why_absent() -> str:
    """Return one sentence: where the library was looked for and how to get it."""
    places = ", ".join(str(path.parent) for path in _candidates())
    return f"no {FILE_NAME} in {places}: the package was installed without a C++ compiler (GCC or Clang)."


def pointer(name: str, tensor: Tensor, dtype: torch.dtype) -> int:
    """Return the address of a dense CPU tensor of `dtype`; InputError for any other."""
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise InputError(
            f"{name} is {tensor.dtype} on {tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}; "
            f"contiguous {dtype} on the CPU is wanted."
        )
    return tensor.data_ptr()
