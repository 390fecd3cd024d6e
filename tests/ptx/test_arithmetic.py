"""Arithmetic instructions against NumPy and Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from .assembly import apply, assemble
from .faults import UnknownInstructionError

F32 = np.float32([1.5, -0.0, 3e38, -2.25, 1e-39, np.inf, np.nan, 0.1, 7.0, -1e-3])
G32 = np.float32([0.5, 0.0, 3e38, 1e-3, 1.0, -1.0, 2.0, np.nan, -7.0, 3.0])
I32 = np.int32([0, 1, -1, 7, -7, 2**31 - 1, -(2**31), 123456789, -5, 100])
J32 = np.int32([3, -1, 5, 2, 2, 2, 3, 987654321, -3, -7])
I64 = np.int64([0, -1, 2**63 - 1, -(2**63), 12345678901234567, -7])
J64 = np.int64([1, 5, 2**62, 3, -98765432109876543, 2])


def python(function: Callable[..., int], dtype: Any) -> Callable[..., np.ndarray]:
    """Return a function on arrays that works on Python's integers and wraps."""
    mask = (1 << 8 * np.dtype(dtype).itemsize) - 1
    unsigned = f"u{np.dtype(dtype).itemsize}"
    return lambda *arrays: np.array([function(*(int(x) for x in row)) & mask for row in zip(*arrays)], unsigned).view(
        dtype
    )


U32, V32 = I32.view(np.uint32), J32.view(np.uint32)
EXACT_CASES: list[tuple[str, tuple[np.ndarray, ...], Any, Callable[..., np.ndarray]]] = [
    ("add.f32 %z, %a, %b;", (F32, G32), np.float32, np.add),
    ("sub.rn.f32 %z, %a, %b;", (F32, G32), np.float32, np.subtract),
    ("mul.f32 %z, %a, %b;", (F32, G32), np.float32, np.multiply),
    ("div.rn.f32 %z, %a, %b;", (F32, G32), np.float32, np.divide),
    ("sqrt.rn.f32 %z, %a;", (F32,), np.float32, np.sqrt),
    ("rcp.rn.f32 %z, %a;", (F32,), np.float32, lambda x: np.float32(1) / x),
    ("neg.f32 %z, %a;", (F32,), np.float32, np.negative),
    ("abs.f32 %z, %a;", (F32,), np.float32, np.abs),
    ("max.f32 %z, %a, %b;", (F32, G32), np.float32, np.fmax),
    ("max.NaN.f32 %z, %a, %b;", (F32, G32), np.float32, np.maximum),
    ("min.f32 %z, %a, %b;", (F32, G32), np.float32, np.fmin),
    ("max.f32 %z, %a, %b, 2.0;", (F32, G32), np.float32, lambda a, b: np.fmax(np.fmax(a, b), np.float32(2))),
    ("copysign.f32 %z, %a, %b;", (F32, G32), np.float32, lambda a, b: np.copysign(b, a)),
    ("add.s32 %z, %a, %b;", (I32, J32), np.int32, python(lambda a, b: a + b, np.int32)),
    ("sub.s64 %z, %a, %b;", (I64, J64), np.int64, python(lambda a, b: a - b, np.int64)),
    ("mul.lo.s32 %z, %a, %b;", (I32, J32), np.int32, python(lambda a, b: a * b, np.int32)),
    ("mul.hi.s32 %z, %a, %b;", (I32, J32), np.int32, python(lambda a, b: a * b >> 32, np.int32)),
    ("mul.hi.u32 %z, %a, %b;", (U32, V32), np.uint32, python(lambda a, b: a * b >> 32, np.uint32)),
    (
        "mul.hi.u64 %z, %a, %b;",
        (I64.view(np.uint64), J64.view(np.uint64)),
        np.uint64,
        python(lambda a, b: a * b >> 64, np.uint64),
    ),
    ("mul.wide.s32 %z, %a, %b;", (I32, J32), np.int64, python(lambda a, b: a * b, np.int64)),
    ("mul.wide.u32 %z, %a, %b;", (U32, V32), np.uint64, python(lambda a, b: a * b, np.uint64)),
    ("mad.lo.s32 %z, %a, %b, -3;", (I32, J32), np.int32, python(lambda a, b: a * b - 3, np.int32)),
    ("mad.wide.s32 %z, %a, %b, 5;", (I32, J32), np.int64, python(lambda a, b: a * b + 5, np.int64)),
    ("div.s32 %z, %a, %b;", (I32, J32), np.int32, python(lambda a, b: int(a / b), np.int32)),
    ("div.u32 %z, %a, %b;", (U32, V32), np.uint32, python(lambda a, b: a // b, np.uint32)),
    ("rem.s32 %z, %a, %b;", (I32, J32), np.int32, python(lambda a, b: a - b * int(a / b), np.int32)),
    ("min.s32 %z, %a, %b;", (I32, J32), np.int32, np.minimum),
    ("max.u32 %z, %a, %b;", (U32, V32), np.uint32, np.maximum),
    ("abs.s32 %z, %a;", (I32,), np.int32, python(abs, np.int32)),
]


@pytest.mark.parametrize(("code", "sources", "dtype", "function"), EXACT_CASES, ids=[case[0] for case in EXACT_CASES])
def test_exact_instructions(
    code: str, sources: tuple[np.ndarray, ...], dtype: Any, function: Callable[..., np.ndarray]
) -> None:
    """Each instruction equals its definition on signs, overflows, NaN, zeros and extremes."""
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(apply(code, *sources, result=dtype), function(*sources))


def test_extremes_know_signed_zeros() -> None:
    """+0 is above −0, in either order."""
    plus, minus = np.float32([0.0, -0.0]), np.float32([-0.0, 0.0])
    assert not np.signbit(apply("max.f32 %z, %a, %b;", plus, minus, result=np.float32)).any()
    assert np.signbit(apply("min.f32 %z, %a, %b;", plus, minus, result=np.float32)).all()


def test_fused_multiply_add_has_one_rounding_and_separate_instructions_two() -> None:
    """(1 + 2⁻¹²)² − 1 keeps its last bit only when fused."""
    a = np.float32([1 + 2**-12])
    fused = apply("fma.rn.f32 %z, %a, %a, 0fBF800000;", a, result=np.float32)
    apart = apply("mul.f32 %z, %a, %a;\n add.f32 %z, %z, 0fBF800000;", a, result=np.float32)
    assert (fused[0], apart[0]) == (np.float32(2**-11 + 2**-24), np.float32(2**-11))


def test_flushing_applies_to_what_goes_in_and_what_comes_out() -> None:
    """`.ftz` turns subnormal inputs and results into zeros; without it they stay."""
    tiny, one = np.float32([2.0**-130, 2.0**-100]), np.float32([2.0**10, 2.0**-30])
    np.testing.assert_array_equal(apply("mul.ftz.f32 %z, %a, %b;", tiny, one, result=np.float32), [0, 0])
    np.testing.assert_array_equal(apply("mul.f32 %z, %a, %b;", tiny, one, result=np.float32), tiny * one)


def test_packed_halves_do_not_touch_each_other() -> None:
    """Two bfloat16, float16 or float32 in one register are calculated with separately."""
    a, b = np.float16([[1.5, -2.0], [60000, 3.0]]), np.float16([[0.25, 8.0], [60000, 0.5]])
    with np.errstate(over="ignore"):
        words = apply("add.f16x2 %z, %a, %b;", a.view(np.uint32)[:, 0], b.view(np.uint32)[:, 0], result=np.uint32)
        np.testing.assert_array_equal(words.view(np.float16).reshape(2, 2), a + b)
    one, three = np.uint32([0x3F803F80]), np.uint32([0x40404040])
    assert apply("fma.rn.bf16x2 %z, %a, %b, %b;", one, three, result=np.uint32)[0] == 0x40C040C0
    c, d = np.float32([[1 + 2**-12, 1e-39]]), np.float32([[3.0, 0.5]])
    for code, expected in (("mul.rn.f32x2", c * d), ("mul.rn.ftz.f32x2", c * d * np.float32([1, 0]))):
        words = apply(f"{code} %z, %a, %b;", c.view(np.uint64)[:, 0], d.view(np.uint64)[:, 0], result=np.uint64)
        np.testing.assert_array_equal(words.view(np.float32), expected[0])


def test_approximate_instructions_are_rounded_or_fuzzed_within_their_bounds() -> None:
    """Without fuzz they equal the rounded quotient; with it they move by up to two units, and repeat for one seed."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(1, 2, (2, 512)).astype(np.float32)
    code = "div.full.f32 %z, %a, %b;"
    np.testing.assert_array_equal(apply(code, a, b, result=np.float32), a / b)
    fuzzed = apply(code, a, b, result=np.float32, fuzz=1)
    steps = fuzzed.view(np.int32) - (a / b).view(np.int32)
    assert set(steps) == {-2, -1, 0, 1, 2}
    np.testing.assert_array_equal(fuzzed, apply(code, a, b, result=np.float32, fuzz=1))
    np.testing.assert_array_equal(apply("div.rn.f32 %z, %a, %b;", a, b, result=np.float32, fuzz=1), a / b)


@pytest.mark.parametrize(
    ("code", "function"),
    [
        ("sqrt.approx.ftz.f32 %z, %a;", np.sqrt),
        ("rsqrt.approx.f32 %z, %a;", lambda x: 1 / np.sqrt(x)),
        ("rcp.approx.ftz.f32 %z, %a;", np.reciprocal),
        ("ex2.approx.ftz.f32 %z, %a;", np.exp2),
        ("lg2.approx.f32 %z, %a;", np.log2),
        ("sin.approx.f32 %z, %a;", np.sin),
        ("cos.approx.f32 %z, %a;", np.cos),
        ("tanh.approx.f32 %z, %a;", np.tanh),
    ],
)
def test_approximate_functions(code: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
    """Without fuzz an approximate function is the float64 one, rounded."""
    values = np.geomspace(0.01, 20, 64).astype(np.float32)
    expected = function(values.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(apply(code, values, result=np.float32), expected)


@pytest.mark.parametrize(
    "code",
    [
        "add.rz.f32 %r1, %r2, %r3;",
        "add.sat.s32 %r1, %r2, %r3;",
        "dp4a.u32.u32 %r1, %r2, %r3, %r4;",
        "ex2.f32 %r1, %r2;",
    ],
)
def test_unknown_instructions_are_refused_when_a_kernel_is_loaded(code: str) -> None:
    """A rounding, a form or an opcode without a meaning raises one error that quotes it."""
    with pytest.raises(UnknownInstructionError, match=code.split(" ", maxsplit=1)[0]):
        assemble(code, 1)
