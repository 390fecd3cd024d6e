"""Logic, shifts, fields, bytes, comparisons and moves against Python's integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from .assembly import apply

U32 = np.uint32([0, 1, 0xFFFFFFFF, 0x80000000, 0x12345678, 0xDEADBEEF, 0x7FFFFFFF, 0xA5])
V32 = np.uint32([3, 31, 32, 0x87654321, 40, 0x0F0F0F0F, 1, 7])


def each(function: Callable[..., int]) -> Callable[..., np.ndarray]:
    """Return a function on arrays that works on Python's integers, modulo 2³²."""
    return lambda *arrays: np.array([function(*(int(x) for x in row)) & 0xFFFFFFFF for row in zip(*arrays)], np.uint32)


def signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def field(x: int, position: int, length: int, sign: bool) -> int:
    """Return the bit field as the ISA defines it, bit by bit."""
    top = x >> min(position + length - 1, 31) & 1 if length and sign else 0
    return sum((x >> position + k & 1 if position + k < 32 and k < length else top) << k for k in range(32))


def permute(a: int, b: int, selector: int) -> int:
    data = (b << 32 | a).to_bytes(8, "little")
    picks = [selector >> 4 * k & 15 for k in range(4)]
    chosen = [(255 if data[pick & 7] & 128 else 0) if pick & 8 else data[pick & 7] for pick in picks]
    return int.from_bytes(bytes(chosen), "little")


CASES: list[tuple[str, Callable[..., np.ndarray]]] = [
    ("and.b32 %z, %a, %b;", np.bitwise_and),
    ("or.b32 %z, %a, %b;", np.bitwise_or),
    ("xor.b32 %z, %a, %b;", np.bitwise_xor),
    ("not.b32 %z, %a;", each(lambda a, b: ~a)),
    ("lop3.b32 %z, %a, %b, 0x0F, 0x6A;", each(lambda a, b: (a & b) ^ 0x0F)),
    ("lop3.b32 %z, %a, %b, 0x0F, 0xFE;", each(lambda a, b: a | b | 0x0F)),
    ("shl.b32 %z, %a, %b;", each(lambda a, b: a << b if b < 32 else 0)),
    ("shr.u32 %z, %a, %b;", each(lambda a, b: a >> min(b, 32))),
    ("shr.s32 %z, %a, %b;", each(lambda a, b: signed(a) >> min(b, 32))),
    ("shf.l.wrap.b32 %z, %a, %b, 7;", each(lambda a, b: (b << 32 | a) << 7 >> 32)),
    ("shf.r.clamp.b32 %z, %a, %b, 40;", each(lambda a, b: b)),
    ("bfe.u32 %z, %a, 3, 9;", each(lambda a, b: field(a, 3, 9, False))),
    ("bfe.s32 %z, %a, 4, 1;", each(lambda a, b: field(a, 4, 1, True))),
    ("bfe.s32 %z, %a, 28, 9;", each(lambda a, b: field(a, 28, 9, True))),
    ("bfi.b32 %z, %a, %b, 5, 11;", each(lambda a, b: (b & ~(0x7FF << 5)) | ((a & 0x7FF) << 5))),
    ("prmt.b32 %z, %a, %b, 0x7351;", each(lambda a, b: permute(a, b, 0x7351))),
    ("prmt.b32 %z, %a, %b, 30258U;", each(lambda a, b: permute(a, b, 30258))),
    ("prmt.b32 %z, %a, %b, 45054;", each(lambda a, b: permute(a, b, 45054))),
    ("prmt.b32 %z, %a, 5, %b;", each(lambda a, b: permute(a, 5, b))),
    ("popc.b32 %z, %a;", each(lambda a, b: bin(a).count("1"))),
    ("clz.b32 %z, %a;", each(lambda a, b: 32 - a.bit_length())),
    ("brev.b32 %z, %a;", each(lambda a, b: int(f"{a:032b}"[::-1], 2))),
    ("mov.b32 %z, %a;", each(lambda a, b: a)),
    ("mov.b64 %rd9, {%a, %b};\n mov.b64 {%r1, %z}, %rd9;", each(lambda a, b: b)),
    ("mov.b32 {%h0, %h1}, %a;\n mov.b32 %z, {%h1, %h0};", each(lambda a, b: a << 16 | a >> 16)),
    ("setp.lt.s32 %q1, %a, %b;\n selp.b32 %z, 1, 2, %q1;", each(lambda a, b: 1 if signed(a) < signed(b) else 2)),
    ("setp.hi.u32 %q1, %a, %b;\n selp.b32 %z, 1, 2, %q1;", each(lambda a, b: 1 if a > b else 2)),
    ("setp.lt.and.u32 %q1|%q2, %a, %b, !%q1;\n selp.b32 %z, 1, 2, %q2;", each(lambda a, b: 1 if a >= b else 2)),
    ("mov.b32 %z, %a;\n @%q0 mov.b32 %z, %b;", lambda a, b: np.where(np.arange(len(a)) % 2, b, a)),
    ("mov.b32 %z, %a;\n @!%q0 mov.b32 %z, %b;", lambda a, b: np.where(np.arange(len(a)) % 2, a, b)),
]


@pytest.mark.parametrize(("code", "function"), CASES, ids=[case[0].replace("\n", "") for case in CASES])
def test_bit_instructions(code: str, function: Callable[..., np.ndarray]) -> None:
    """Each instruction equals its definition, shift amounts of 32 and more included."""
    if "%h0" in code:
        code = f"{{ .reg .b16 %h0, %h1; {code} }}"
    np.testing.assert_array_equal(apply(code, U32, V32, result=np.uint32), function(U32, V32))


NAN = np.float32(np.nan)


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [
        ("lt", [1, 0, 0, 0]),
        ("ltu", [1, 0, 0, 1]),
        ("eq", [0, 1, 0, 0]),
        ("equ", [0, 1, 0, 1]),
        ("neu", [1, 0, 1, 1]),
        ("ge", [0, 1, 1, 0]),
        ("num", [1, 1, 1, 0]),
        ("nan", [0, 0, 0, 1]),
    ],
)
def test_comparisons_of_floats_with_nan(comparison: str, expected: list[Any]) -> None:
    """An ordered comparison with NaN fails, an unordered one holds."""
    a, b = np.float32([1, 2, 3, NAN]), np.float32([2, 2, 2, 2])
    code = f"setp.{comparison}.f32 %q1, %a, %b;\n selp.b32 %z, 1, 0, %q1;"
    np.testing.assert_array_equal(apply(code, a, b, result=np.uint32), expected)
