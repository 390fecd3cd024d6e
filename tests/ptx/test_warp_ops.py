"""Shuffles, votes, reductions and barriers against the ISA's definitions."""

from __future__ import annotations

import numpy as np
import pytest

from .assembly import apply, assemble
from .faults import DivergentBarrierError, InactiveLaneError, TrapError

LANES = np.arange(64)
VALUES = np.random.default_rng(0).integers(0, 2**32, 64).astype(np.uint32)


@pytest.mark.parametrize(
    ("code", "source"),
    [
        ("shfl.sync.bfly.b32 %z, %a, 5, 31, -1;", LANES ^ 5),
        ("shfl.sync.idx.b32 %z, %a, 9, 31, -1;", LANES // 32 * 32 + 9),
        ("shfl.sync.up.b32 %z, %a, 3, 0, -1;", np.where(LANES % 32 >= 3, LANES - 3, LANES)),
        ("shfl.sync.down.b32 %z, %a, 3, 31, -1;", np.where(LANES % 32 < 29, LANES + 3, LANES)),
        ("shfl.sync.bfly.b32 %z, %a, 5, 0x1807, -1;", LANES ^ 5),
        ("shfl.sync.down.b32 %z, %a, 3, 0x1807, -1;", np.where(LANES % 8 < 5, LANES + 3, LANES)),
    ],
    ids=["bfly", "idx", "up", "down", "bfly in eights", "down in eights"],
)
def test_shuffles(code: str, source: np.ndarray) -> None:
    """Each lane takes the value of its partner, or its own where there is none; warps stay apart."""
    np.testing.assert_array_equal(apply(code, VALUES, result=np.uint32), VALUES[source])


def test_a_shuffle_tells_whether_the_partner_was_in_range() -> None:
    """The predicate behind `|` fails for lanes that keep their own value."""
    code = "shfl.sync.down.b32 %r1|%q1, %a, 3, 31, -1;\n selp.b32 %z, 1, 0, %q1;"
    np.testing.assert_array_equal(apply(code, VALUES, result=np.uint32), LANES % 32 < 29)


def test_a_shuffle_from_an_absent_lane_is_reported() -> None:
    """Odd lanes alone cannot take values from even ones."""
    with pytest.raises(InactiveLaneError, match="absent lane"):
        apply("mov.b32 %z, 0;\n @%q0 shfl.sync.bfly.b32 %z, %a, 1, 31, -1;", VALUES, result=np.uint32)


def by_warp(function: object) -> np.ndarray:
    """Return one value per warp, repeated for its lanes."""
    return np.repeat([function(half) for half in VALUES.reshape(2, 32)], 32)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("redux.sync.max.u32 %z, %a, -1;", by_warp(np.max)),
        ("redux.sync.min.s32 %z, %a, -1;", by_warp(lambda x: x.view(np.int32).min()).astype(np.int32).view(np.uint32)),
        ("redux.sync.add.u32 %z, %a, -1;", by_warp(lambda x: int(x.sum()) & 0xFFFFFFFF)),
        ("redux.sync.xor.b32 %z, %a, -1;", by_warp(np.bitwise_xor.reduce)),
        ("vote.sync.ballot.b32 %z, %q0, -1;", np.full(64, 0xAAAAAAAA)),
        ("vote.sync.any.pred %q1, %q0, -1;\n selp.b32 %z, 1, 0, %q1;", np.ones(64)),
        ("vote.sync.all.pred %q1, %q0, -1;\n selp.b32 %z, 1, 0, %q1;", np.zeros(64)),
        ("activemask.b32 %z;", np.full(64, 0xFFFFFFFF)),
        ("elect.sync %r1|%q1, -1;\n selp.b32 %z, 1, 0, %q1;", LANES % 32 == 0),
    ],
    ids=["redux max", "redux min", "redux add", "redux xor", "ballot", "any", "all", "activemask", "elect"],
)
def test_values_of_a_whole_warp(code: str, expected: np.ndarray) -> None:
    """Reductions and votes give all lanes of a warp one value."""
    np.testing.assert_array_equal(apply(code, VALUES, result=np.uint32), expected)


@pytest.mark.parametrize(("modifier", "nan"), [("", False), (".NaN", True)])
def test_reduction_of_floats_with_nan(modifier: str, nan: bool) -> None:
    """The largest magnitude skips NaN, or keeps it with `.NaN`."""
    values = np.float32([np.nan, -5.0, *np.zeros(30)])
    result = apply(f"redux.sync.max.abs{modifier}.f32 %z, %a, -1;", values, result=np.float32)
    assert np.isnan(result).all() if nan else (result == 5).all()


def test_a_barrier_that_some_threads_miss_is_reported() -> None:
    """A barrier under a branch that odd threads take is a deadlock on a GPU."""
    code = "and.b32 %r1, %tid, 1;\n setp.eq.s32 %q0, %r1, 0;\n @%q0 bra $L_end;\n bar.sync 0;\n$L_end:"
    with pytest.raises(DivergentBarrierError, match="32 threads reach a barrier for 64"):
        assemble(code, 1, threads=64).launch([np.zeros(1)], (2,))


def test_threads_that_have_left_are_not_waited_for() -> None:
    """A warp that ended early does not hold the others up; a barrier counts once per program."""
    code = "setp.ge.u32 %q0, %tid, 32;\n @%q0 ret;\n bar.sync 0;"
    assert assemble(code, 1, threads=64).launch([np.zeros(1)], (3,)).barriers == 3


def test_a_barrier_with_a_number_of_threads_wants_that_many() -> None:
    """A named barrier of 32 threads is satisfied by one warp of two."""
    code = "setp.ge.u32 %q0, %tid, 32;\n @%q0 bra $L_end;\n bar.sync 1, {count};\n$L_end:"
    assemble(code.replace("{count}", "32"), 1, threads=64).launch([np.zeros(1)], (1,))
    with pytest.raises(DivergentBarrierError):
        assemble(code.replace("{count}", "64"), 1, threads=64).launch([np.zeros(1)], (1,))


def test_a_trap_ends_the_launch() -> None:
    """A failed device assertion is reported with its thread."""
    with pytest.raises(TrapError, match="thread 1"):
        apply("mov.b32 %z, 0;\n @%q0 trap;", VALUES, result=np.uint32)


def test_hints_and_orders_change_nothing() -> None:
    """Fences, prefetches and cache policies are accepted."""
    code = "fence.acq_rel.gpu;\n createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0;\n mov.b32 %z, %a;"
    np.testing.assert_array_equal(apply(code, VALUES, result=np.uint32), VALUES)
