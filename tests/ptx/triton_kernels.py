"""Small Triton kernels and their compilation for NVIDIA targets."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from .program import Program

triton = pytest.importorskip("triton", reason="Triton is not installed: it is for Linux only")
tl = pytest.importorskip("triton.language", reason="Triton is not installed: it is for Linux only")

TARGETS = [80, 86, 89, 90, 100, 120]
# wgmma and tcgen05, which the others use for products, are not emulated.
DOT_TARGETS = [80, 86, 89, 120]


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def largest(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out + tl.program_id(0), tl.max(tl.abs(values), 0))


@triton.jit
def total(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        sums += tl.load(x + start + i, mask=start + i < n, other=0.0)
    tl.store(out, tl.sum(sums, 0))


@triton.jit
def halve(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + i, mask=i < n).to(tl.float32)
    tl.store(out + i, (values * 0.5).to(tl.bfloat16), mask=i < n)


@triton.jit
def transpose(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    values = tl.load(x + row[:, None] * COLUMNS + column[None, :])
    tl.store(out + column[:, None] * ROWS + row[None, :], tl.trans(values))


@triton.jit
def product(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(left, right))


@triton.jit
def root_of_quotient(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    quotient = tl.load(x + i, mask=i < n, other=1.0) / tl.load(y + i, mask=i < n, other=1.0)
    tl.store(out + i, tl.sqrt(quotient), mask=i < n)


@triton.jit
def add_one_to_all(table, sizes, BLOCK: tl.constexpr):
    """Add 1 to the tensors whose addresses stand in a table."""
    tensor = tl.program_id(0)
    values = tl.load(table + tensor).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, BLOCK)
    mask = i < tl.load(sizes + tensor)
    tl.store(values + i, tl.load(values + i, mask=mask) + 1.0, mask=mask)


@triton.jit
def count_up(out, BLOCK: tl.constexpr):
    tl.atomic_add(out + tl.arange(0, BLOCK) % 4, 1)


@functools.cache
def load(function: Any, target: int, types: tuple[str, ...], num_warps: int = 4, **constants: int) -> Program:
    """Compile a kernel; every argument before its constants counts as divisible by 16."""
    signature = dict(zip(function.arg_names, types)) | dict.fromkeys(constants, "constexpr")
    attributes = {(k,): [["tt.divisibility", 16]] for k in range(len(types))}
    source = triton.compiler.ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    gpu = triton.backends.compiler.GPUTarget("cuda", target, 32)
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    return Program.of(triton.compile(source, target=gpu, options=options))
