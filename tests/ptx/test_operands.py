"""Immediates, registers of other widths, and predicates as operands."""

from __future__ import annotations

import numpy as np
import pytest

from .assembly import apply, assemble
from .faults import UnknownInstructionError


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("0x10", 16),
        ("-1", 0xFFFFFFFF),
        ("0f3F800000", 0x3F800000),
        ("30578U", 30578),
        ("0b101", 5),
        ("2147483648", 1 << 31),
    ],
)
def test_immediates(text: str, bits: int) -> None:
    """Hexadecimal, negative, binary and unsigned integers, and floats by their bits."""
    assert apply(f"mov.b32 %z, {text};", np.zeros(1, np.uint32), result=np.uint32)[0] == bits


def test_a_wider_register_is_cut_and_a_narrower_result_extended() -> None:
    """A 16-bit operation on a 32-bit register sees its low half; `s16` into 32 bits keeps the sign."""
    values = np.uint32([0x12348001, 0xFFFF0002])
    added = apply("{ .reg .b16 %h; add.s16 %h, %a, 1; cvt.s32.s16 %z, %h; }", values, result=np.int32)
    np.testing.assert_array_equal(added, [0x8002 - 0x10000, 3])


def test_a_register_nobody_wrote_holds_no_useful_value() -> None:
    """Reading it gives neither zero nor what another launch left there."""
    assert apply("mov.b32 %z, %r9;", np.zeros(1, np.uint32), result=np.uint32)[0] == 0xA5A5A5A5


@pytest.mark.parametrize(
    "code",
    ["mov.b32 %r1, %clock;", "mov.b32 %r1, nothing;", "mov.b32 %undeclared, 1;", "ld.global.b32 %r1, [%rd1+%rd2];"],
    ids=["special register", "symbol", "register", "address"],
)
def test_unknown_operands_are_refused(code: str) -> None:
    """A name or an address form without a meaning raises when the kernel is loaded."""
    with pytest.raises(UnknownInstructionError):
        assemble(code, 1)
