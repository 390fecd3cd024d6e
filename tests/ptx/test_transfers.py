"""Loads, stores, atomics and asynchronous copies, and what they must not do."""

from __future__ import annotations

import numpy as np
import pytest

from .assembly import assemble
from .faults import MisalignedError, OutOfBoundsError, SharedRaceError, UninitialisedReadError, UnknownInstructionError
from .lanes import Checks

ADDRESSES = "mad.wide.u32 %rd0, %tid, 16, %p0;\n mad.wide.u32 %rd1, %tid, 16, %p1;\n"
COPY = ADDRESSES + "ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%rd0];\n st.global.v4.b32 [%rd1], {%r0, %r1, %r2, %r3};"


def test_vector_loads_and_stores_move_every_element() -> None:
    """16 bytes per lane arrive in order, and count as one wide request per warp."""
    source, target = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    counters = assemble(COPY, 2).launch([source, target], (1,))
    np.testing.assert_array_equal(target, source)
    assert (counters.loads.widths, counters.stores.widest, counters.loads.sectors) == ({16: 1}, 16, 16)


def test_bytes_widen_with_zeros_or_their_sign() -> None:
    """`ld.u8` and `ld.s8` into 32-bit registers differ for 0x80 and more."""
    source, target = np.full(32, 0x85, np.uint8), np.zeros(32, np.int32)
    for kind, expected in (("u8", 0x85), ("s8", 0x85 - 256)):
        code = f"cvt.u64.u32 %rd0, %tid;\n add.s64 %rd0, %p0, %rd0;\n ld.global.{kind} %r0, [%rd0];\n"
        code += "mad.wide.u32 %rd1, %tid, 4, %p1;\n st.global.b32 [%rd1], %r0;"
        assemble(code, 2).launch([source, target], (1,))
        assert (target == expected).all()


def test_a_short_buffer_is_reported_with_place_and_thread() -> None:
    """One element too few: the last thread's access is named."""
    source, target = np.zeros(127, np.float32), np.zeros(128, np.float32)
    with pytest.raises(OutOfBoundsError, match=r"16-byte load .* byte 496 of the 508 bytes .* thread 31"):
        assemble(COPY, 2).launch([source, target], (1,))


def test_a_misaligned_pointer_is_reported() -> None:
    """A slice that starts 4 bytes into its array cannot be read 16 bytes at a time."""
    source, target = np.zeros(132, np.float32), np.zeros(128, np.float32)
    with pytest.raises(MisalignedError, match="16-byte load is misaligned"):
        assemble(COPY, 2).launch([source[1:129], target], (1,))


def test_a_null_pointer_is_out_of_bounds() -> None:
    """Address 0 belongs to no buffer."""
    with pytest.raises(OutOfBoundsError, match="before every buffer"):
        assemble(COPY, 2).launch([0, np.zeros(128, np.float32)], (1,))


def test_shared_memory_has_bounds() -> None:
    """The launch's shared bytes are the limit."""
    code = "mov.b32 %r0, global_smem;\n mad.lo.s32 %r0, %tid, 4, %r0;\n st.shared.b32 [%r0], %tid;"
    assemble(code, 1, shared_bytes=128).launch([np.zeros(1)], (1,))
    with pytest.raises(OutOfBoundsError, match="127 shared bytes"):
        assemble(code, 1, shared_bytes=127).launch([np.zeros(1)], (1,))


EXCHANGE = """
    mov.b32 %r0, global_smem;
    mad.lo.s32 %r1, %tid, 4, %r0;
    st.shared.b32 [%r1], %tid;
    {barrier}
    xor.b32 %r2, %tid, 32;
    mad.lo.s32 %r2, %r2, 4, %r0;
    ld.shared.b32 %r3, [%r2];
    mad.wide.u32 %rd0, %tid, 4, %p0;
    st.global.b32 [%rd0], %r3;
"""


def test_warps_exchange_values_through_shared_memory_with_a_barrier_only() -> None:
    """Two warps swap their numbers; without the barrier that is a race, unless nobody checks."""
    target = np.zeros(64, np.uint32)
    assemble(EXCHANGE.format(barrier="bar.sync 0;"), 1, 64, shared_bytes=256).launch([target], (1,))
    np.testing.assert_array_equal(target, np.arange(64) ^ 32)
    racing = assemble(EXCHANGE.format(barrier=""), 1, 64, shared_bytes=256)
    with pytest.raises(SharedRaceError, match="reads what another warp wrote"):
        racing.launch([target], (1,))
    racing.launch([target], (1,), checks=Checks(shared_races=False))


def test_reading_unwritten_shared_memory_is_reported() -> None:
    """A read that nobody wrote before is a fault, unless nobody checks."""
    reader = assemble(EXCHANGE.format(barrier="bar.sync 0;"), 1, 64, shared_bytes=256).mutant(r"st\.shared[^;]*;", "")
    with pytest.raises(UninitialisedReadError, match="nobody has written"):
        reader.launch([np.zeros(64, np.uint32)], (1,))
    reader.launch([np.zeros(64, np.uint32)], (1,), checks=Checks(uninitialised=False))


def test_atomics_add_up_over_lanes_and_programs() -> None:
    """Every lane's addition counts and the old values are all different; compare-and-swap wins once."""
    code = """
    atom.global.add.s32 %r0, [%p0], 2;
    red.global.add.f32 [%p0+4], 0f3F000000;
    atom.global.cas.b32 %r1, [%p0+8], 0, 7;
    mov.u32 %r2, %ctaid.x;
    mad.lo.s32 %r2, %r2, 32, %tid;
    mad.wide.u32 %rd0, %r2, 4, %p1;
    st.global.b32 [%rd0], %r0;
    """
    totals, old = np.zeros(3, np.uint32), np.zeros(96, np.uint32)
    counters = assemble(code, 2).launch([totals, old], (3,))
    assert totals.tolist() == [192, int(np.float32(48).view(np.uint32)), 7]
    assert sorted(old.tolist()) == list(range(0, 192, 2))
    assert counters.atomics.requests == 9


ASYNCHRONOUS = """
    mov.b32 %r0, global_smem;
    mad.lo.s32 %r1, %tid, 16, %r0;
    mad.wide.u32 %rd0, %tid, 16, %p0;
    cp.async.cg.shared.global [%r1+0], [%rd0+0], 16, 16;
    cp.async.commit_group;
    {wait}
    ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r1];
    mad.wide.u32 %rd1, %tid, 16, %p1;
    st.global.v4.b32 [%rd1], {{%r2, %r3, %r4, %r5}};
"""


def test_an_asynchronous_copy_arrives_when_it_is_waited_for() -> None:
    """After the wait the values are there; without it the memory is still unwritten."""
    source, target = np.arange(384, dtype=np.float32), np.zeros(128, np.float32)
    waits = assemble(ASYNCHRONOUS.format(wait="cp.async.wait_group 0;"), 2, shared_bytes=512)
    waits.launch([source, target], (1,))
    np.testing.assert_array_equal(target, source[:128])
    hurries = assemble(ASYNCHRONOUS.format(wait="cp.async.wait_group 1;"), 2, shared_bytes=512)
    with pytest.raises(UninitialisedReadError):
        hurries.launch([source, target], (1,))


def test_an_asynchronous_copy_of_no_bytes_writes_zeros() -> None:
    """That is how Triton masks: nothing is read, not even out of bounds."""
    target = np.ones(128, np.float32)
    code = ASYNCHRONOUS.format(wait="cp.async.wait_all;").replace("16, 16;", "16, 0;")
    assemble(code, 2, shared_bytes=512).launch([np.zeros(1, np.float32), target], (1,))
    assert not target.any()


@pytest.mark.parametrize("code", ["ld.local.b32 %r1, [%rd1];", "atom.global.add.noftz.bf16 %r1, [%rd1], %r2;"])
def test_unknown_transfers_are_refused(code: str) -> None:
    """A state space or format without a meaning raises when the kernel is loaded."""
    with pytest.raises(UnknownInstructionError):
        assemble(code, 1)
