"""The compiled library is found or not, and a broken one is never silently passed over."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lisa_kernels import native
from lisa_kernels.errors import InputError
from lisa_kernels.ops.blockwise8 import dequantize_blockwise

needs_library = pytest.mark.skipif(native.load() is None, reason=native.why_absent())

# Makes the library absent before the package is imported, then runs one of its operations.
WITHOUT_LIBRARY = """
from pathlib import Path
exists = Path.exists
Path.exists = lambda path: not path.name.startswith("liblisa_kernels") and exists(path)
import torch
from lisa_kernels.ops.blockwise8 import dequantize_blockwise, quantize_blockwise
codes, absmax = quantize_blockwise(torch.ones(300), "m")
torch.testing.assert_close(dequantize_blockwise(codes, absmax, "m"), torch.ones(300))
assert not torch._C._dispatch_has_kernel_for_dispatch_key("lisa_kernels::quantize_blockwise", "CPU")
"""


def test_the_library_beside_the_package_is_looked_for_first() -> None:
    assert native._candidates()[0] == Path(native.__file__).parent / native.FILE_NAME


def test_an_absent_library_is_none_and_the_reason_names_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_candidates", lambda: [tmp_path / native.FILE_NAME])
    assert native.load.__wrapped__() is None
    assert str(tmp_path) in native.why_absent()
    assert "without a C++ compiler" in native.why_absent()


def test_a_file_that_is_no_library_raises_instead_of_falling_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / native.FILE_NAME
    broken.write_text("not a library")
    monkeypatch.setattr(native, "_candidates", lambda: [broken])
    with pytest.raises(RuntimeError, match="Reinstall"):
        native.load.__wrapped__()


def test_a_library_of_something_else_raises() -> None:
    other = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    with pytest.raises(RuntimeError, match="not a usable library of CPU kernels"):
        native.open_library(other)


@needs_library
def test_a_library_of_another_version_raises_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.load()
    assert library is not None
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    with pytest.raises(RuntimeError, match=rf"version {native.ABI_VERSION - 1} of the C interface.*Reinstall"):
        native.open_library(library.path)


@needs_library
def test_the_library_is_loaded_once() -> None:
    assert native.load() is native.load()


def test_the_operations_run_on_their_definitions_without_a_library() -> None:
    finished = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARY], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4, 4).t()[1:], torch.zeros(4, dtype=torch.float64), torch.zeros(4, device="meta")],
    ids=["strided", "float64", "meta"],
)
def test_only_dense_cpu_tensors_of_the_wanted_dtype_have_an_address(tensor: torch.Tensor) -> None:
    with pytest.raises(InputError, match="is wanted"):
        native.pointer("the weight", tensor, torch.float32)


def test_the_one_wrong_tensor_of_many_is_named() -> None:
    tensors = [torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int32), torch.zeros(4)]
    with pytest.raises(InputError, match=r"a gradient is torch\.int32; contiguous float32 or bfloat16 .* is wanted"):
        native.float_addresses("a gradient", tensors)
    with pytest.raises(InputError, match=r"m is torch\.bfloat16; contiguous float32 is wanted"):
        native.addresses("m", tensors, torch.float32)
    assert native.float_addresses("a gradient", tensors[:2]) == ([t.data_ptr() for t in tensors[:2]], [0, 1])


def test_one_strided_tensor_of_many_is_named() -> None:
    tensors = [torch.zeros(4), torch.zeros(4)[::2]]
    for refused in (
        lambda: native.float_addresses("a gradient", tensors),
        lambda: native.addresses("a gradient", tensors, torch.float32),
    ):
        with pytest.raises(InputError, match=r"a gradient is torch\.float32, not contiguous; .* is wanted"):
            refused()


def test_a_table_has_a_row_per_tensor_and_is_dense() -> None:
    """The C side reads rows one behind the other, 64 bits per field."""
    tensors = [
        torch.zeros(n, dtype=dtype) for n, dtype in ((3, torch.float16), (0, torch.float32), (5, torch.bfloat16))
    ]
    rows, where = native.table(native.counts(tensors), native.float_addresses("a tensor", tensors)[1])
    assert rows.itemsize == 8
    assert list((ctypes.c_int64 * len(rows)).from_address(where)) == [3, 2, 0, 0, 5, 1]
    assert not native.table([], [])[0]


@needs_library
def test_a_library_that_takes_over_is_the_one_that_operations_call() -> None:
    """Operations hold the library from their registration on; a test of another build must reach them all."""
    library = native.load()
    assert library is not None
    own = dict(library.functions)
    called = []

    def record(*arguments: object) -> None:
        called.append(arguments)

    try:
        library.take_over(replace(library, functions=dict.fromkeys(own, record)))  # type: ignore[misc]
        dequantize_blockwise(torch.zeros(4, dtype=torch.uint8), torch.zeros(1), "m")
    finally:
        library.take_over(replace(library, functions=own))
    assert len(called) == 1
