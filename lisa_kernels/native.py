"""The compiled library: where it is found, and its C interface as `csrc/api.h` and `csrc/managed.h` declare it.

A library that is absent is no error: the PyTorch definitions run in its place. One that is present but cannot be
loaded, or is of another version, raises, because a silent fallback would cost a factor of a hundred.
"""

from __future__ import annotations

import ctypes
import sys
from array import array
from collections.abc import Collection, Iterable, Sequence
from ctypes import c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lisa_kernels.errors import InputError

ABI_VERSION = 9
FILE_NAME = "liblisa_kernels.dylib" if sys.platform == "darwin" else "liblisa_kernels.so"
INSTRUCTION_SETS = ("baseline", "AVX2", "AVX-512")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_REINSTALL = "Reinstall the package with a C++ compiler present: pip install --force-reinstall --no-deps lisa_kernels"

# Tables of tensors and all arrays are passed as addresses.
_SIGNATURES: dict[str, list[object]] = {
    "step_inputs": [c_void_p, c_void_p, c_int64, c_float, c_void_p, c_void_p, c_int64, c_void_p, c_void_p],
    "adamw8": [c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int32, c_int32, c_int32],
    "adamw32": [c_void_p, c_int64, c_void_p, c_void_p, c_int32, c_int32, c_int32],
    "grad_norm": [c_void_p, c_int64, c_int32, c_void_p, c_int32, c_int32],
    "quantize_blockwise": [*[c_void_p] * 3, c_int64, c_int64, c_int32, c_int32, c_uint64, c_int32, c_int32],
    "dequantize_blockwise": [*[c_void_p] * 3, c_int64, c_int64, *[c_int32] * 3],
    "quantize_resting": [*[c_void_p] * 3, c_int64, *[c_int32] * 4],
    "dequantize_resting": [*[c_void_p] * 3, c_int64, *[c_int32] * 4],
    "fold": [*[c_void_p] * 3, c_int64, c_int64, c_float, c_uint64, *[c_int32] * 4],
    # Of csrc/managed.h; the last two arguments take the words of an error.
    "managed_open": [c_char_p, c_int32, c_void_p, c_char_p, c_int64],
    "managed_close": [c_void_p, c_char_p, c_int64],
    "managed_allocate": [c_void_p, c_int64, c_int32, c_void_p, c_char_p, c_int64],
    "managed_prefetch": [c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_char_p, c_int64],
    "managed_drop": [c_void_p, c_char_p, c_int64],
    "managed_live_bytes": [c_void_p, c_void_p, c_char_p, c_int64],
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

    def take_over(self, other: Library) -> None:
        """Run the functions of `other` from now on, in all operations that hold this library: for tests of a build."""
        self.functions.update(other.functions)


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


_dtype_of = attrgetter("dtype")

# The functions below see thousands of tensors at a time: their checks are loops in C, and the one wrong tensor is
# looked for once there is one.


def _refuse_first(name: str, tensors: Sequence[Tensor], dtypes: Collection[torch.dtype]) -> NoReturn:
    wrong = next(tensor for tensor in tensors if tensor.dtype not in dtypes or not tensor.is_contiguous())
    raise InputError(
        f"{name} is {wrong.dtype}{'' if wrong.is_contiguous() else ', not contiguous'}; contiguous "
        f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} is wanted."
    )


def addresses(name: str, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[int]:
    """Return the addresses of dense tensors of `dtype`, all on the CPU; InputError if one is of another kind."""
    if not all(map(Tensor.is_contiguous, tensors)) or not set(map(_dtype_of, tensors)) <= {dtype}:
        _refuse_first(name, tensors, [dtype])
    return list(map(Tensor.data_ptr, tensors))


def float_addresses(name: str, tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Return the addresses and dtype codes of dense weights or gradients, all on the CPU; InputError as above."""
    try:
        codes = list(map(DTYPE_CODES.__getitem__, map(_dtype_of, tensors)))
    except KeyError:
        _refuse_first(name, tensors, DTYPE_CODES)
    if not all(map(Tensor.is_contiguous, tensors)):
        _refuse_first(name, tensors, DTYPE_CODES)
    return list(map(Tensor.data_ptr, tensors)), codes


def pointer(name: str, tensor: Tensor, dtype: torch.dtype) -> int:
    """Return the address of a dense CPU tensor of `dtype`; InputError for any other."""
    if tensor.device.type != "cpu":
        raise InputError(f"{name} is on {tensor.device}; a tensor on the CPU is wanted.")
    return addresses(name, [tensor], dtype)[0]


def counts(tensors: Sequence[Tensor]) -> list[int]:
    """Return how many elements each tensor has."""
    return list(map(Tensor.numel, tensors))


def array_of(kind: str, values: Iterable[float]) -> tuple[array[Any], int]:
    """Return an array of int64 ("q") or float64 ("d") and its address, which is good as long as the array is held."""
    held = array(kind, values)
    return held, held.buffer_info()[0]


def table(*columns: list[int]) -> tuple[array[Any], int]:
    """Return int64 [k · columns], the rows of a table of `csrc/api.h`, and its address, good as long as it is held."""
    return array_of("q", chain.from_iterable(zip(*columns)))
