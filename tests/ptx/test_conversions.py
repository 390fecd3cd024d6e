"""Conversions between formats, with ties, ranges and NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .assembly import apply, assemble
from .faults import UnknownInstructionError

VALUES = np.float32([0.5, 1.5, 2.5, -1.5, -0.5, 300.7, -300.7, 3e9, -3e9, np.inf, np.nan, 1 + 2**-8, 65520.0])


def test_float32_to_bfloat16_and_back() -> None:
    """Rounding to nearest even as torch does, alone and in pairs; cutting off with `.rz`."""
    expected = torch.from_numpy(VALUES).bfloat16().view(torch.int16).numpy().view(np.uint16)
    expected[np.isnan(VALUES)] = 0x7FFF
    np.testing.assert_array_equal(apply("cvt.rn.bf16.f32 %z, %a;", VALUES, result=np.uint16), expected)
    pairs = apply("cvt.rn.bf16x2.f32 %z, %a, 0f3F800000;", VALUES, result=np.uint32)
    np.testing.assert_array_equal(pairs, (expected.astype(np.uint32) << 16) | 0x3F80)
    cut = apply("cvt.rz.bf16.f32 %z, %a;", VALUES, result=np.uint16)
    np.testing.assert_array_equal(cut, VALUES.view(np.uint32) >> 16)
    back = apply("cvt.f32.bf16 %z, %a;", expected, result=np.float32)
    np.testing.assert_array_equal(back.view(np.uint32), expected.astype(np.uint32) << 16)


def test_float32_to_float16_and_back() -> None:
    """NumPy's half precision, overflow to infinity included."""
    with np.errstate(over="ignore"):
        expected = VALUES.astype(np.float16)
    np.testing.assert_array_equal(apply("cvt.rn.f16.f32 %z, %a;", VALUES, result=np.float16), expected)
    np.testing.assert_array_equal(
        apply("cvt.f32.f16 %z, %a;", expected, result=np.float32), expected.astype(np.float32)
    )


@pytest.mark.parametrize(
    ("code", "dtype", "expected"),
    [
        ("cvt.rzi.s32.f32", np.int32, [0, 1, 2, -1, 0, 300, -300, 2**31 - 1, -(2**31), 2**31 - 1, 0, 1, 65520]),
        ("cvt.rni.s32.f32", np.int32, [0, 2, 2, -2, 0, 301, -301, 2**31 - 1, -(2**31), 2**31 - 1, 0, 1, 65520]),
        ("cvt.rmi.s32.f32", np.int32, [0, 1, 2, -2, -1, 300, -301, 2**31 - 1, -(2**31), 2**31 - 1, 0, 1, 65520]),
        ("cvt.rpi.u32.f32", np.uint32, [1, 2, 3, 0, 0, 301, 0, 3 * 10**9, 0, 2**32 - 1, 0, 2, 65520]),
        ("cvt.rzi.u16.f32", np.uint16, [0, 1, 2, 0, 0, 300, 0, 65535, 0, 65535, 0, 1, 65520]),
        (
            "cvt.rzi.s64.f32",
            np.int64,
            [0, 1, 2, -1, 0, 300, -300, 3 * 10**9, -3 * 10**9, 2**63 - 1, -(2**63), 1, 65520],
        ),
    ],
)
def test_float_to_integer_rounds_as_asked_and_clamps(code: str, dtype: type, expected: list[int]) -> None:
    """Values outside of the range give its ends; NaN gives 0, or the lowest number where 64 bits are involved."""
    np.testing.assert_array_equal(apply(f"{code} %z, %a;", VALUES, result=dtype), np.array(expected, dtype))


def test_integers_widen_by_their_own_sign_and_saturate_when_asked() -> None:
    """The source's type decides about the sign, the target's about the limits."""
    values = np.int32([-1, 200, 70000, -70000])
    np.testing.assert_array_equal(apply("cvt.s64.s32 %z, %a;", values, result=np.int64), values)
    np.testing.assert_array_equal(apply("cvt.u64.u32 %z, %a;", values, result=np.uint64), values.view(np.uint32))
    np.testing.assert_array_equal(apply("cvt.u16.u32 %z, %a;", values, result=np.uint16), values.astype(np.uint16))
    np.testing.assert_array_equal(apply("cvt.sat.u8.s32 %z, %a;", values, result=np.uint8), [0, 200, 255, 0])
    np.testing.assert_array_equal(
        apply("cvt.s32.s8 %z, %a;", values.astype(np.int8), result=np.int32), values.astype(np.int8)
    )


def test_integer_to_float_rounds_once() -> None:
    """2³¹ − 1 rounds to 2³¹; unsigned and 64-bit sources keep their size."""
    values = np.int32([2**31 - 1, -5, 2**24 + 1])
    np.testing.assert_array_equal(apply("cvt.rn.f32.s32 %z, %a;", values, result=np.float32), values.astype(np.float32))
    unsigned = values.view(np.uint32)
    np.testing.assert_array_equal(
        apply("cvt.rn.f32.u32 %z, %a;", unsigned, result=np.float32), unsigned.astype(np.float32)
    )


def test_float_to_float_rounds_to_whole_numbers_when_asked() -> None:
    """`.rni` on floats rounds to the nearest whole number, ties to even."""
    np.testing.assert_array_equal(apply("cvt.rni.f32.f32 %z, %a;", VALUES, result=np.float32), np.rint(VALUES))


def test_tf32_keeps_ten_bits() -> None:
    """Ties round away from zero."""
    values = np.float32([1 + 2**-11, 1 + 2**-12, -1 - 2**-11])
    expected = np.float32([1 + 2**-10, 1, -1 - 2**-10])
    np.testing.assert_array_equal(apply("cvt.rna.tf32.f32 %z, %a;", values, result=np.float32), expected)


@pytest.mark.parametrize("code", ["cvt.rn.e4m3x2.f32", "cvt.rz.f16.f32", "cvt.rn.f16.s32"])
def test_unknown_conversions_are_refused(code: str) -> None:
    """A format or rounding without a meaning raises when the kernel is loaded."""
    with pytest.raises(UnknownInstructionError):
        assemble(f"{code} %r1, %r2;", 1)
