"""Compiled Triton kernels run to NumPy's results, and every deliberate defect in them is caught."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from . import triton_kernels as kernels
from .assembly import assemble
from .faults import GlobalRaceError, MisalignedError, OutOfBoundsError, PtxError, SharedRaceError, TrapError
from .lanes import Checks
from .memory import Memory
from .program import Program

N = 3008
POINTERS_AND_SIZE = ("*fp32", "*fp32", "*fp32", "i32")
every_target = pytest.mark.parametrize("target", kernels.TARGETS)


def normal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


@every_target
def test_a_masked_add_equals_numpy(target: int) -> None:
    """Bit for bit, with 16-byte accesses, and nothing behind the end is touched."""
    x, y, out = normal(N, 1), normal(N, 2), np.full(N, np.nan, np.float32)
    counters = kernels.load(kernels.add, target, POINTERS_AND_SIZE, BLOCK=1024).launch([x, y, out, N], (3,), 4)
    np.testing.assert_array_equal(out, x + y)
    assert (counters.loads.bytes, counters.stores.bytes) == (8 * N, 4 * N)
    assert counters.loads.widest == counters.stores.widest == 16


@every_target
@pytest.mark.parametrize("num_warps", [1, 4])
def test_a_reduction_over_warps_equals_numpy(target: int, num_warps: int) -> None:
    """Shuffles within warps, shared memory between them; one value per program."""
    x, out = normal(N), np.zeros(3, np.float32)
    program = kernels.load(kernels.largest, target, ("*fp32", "*fp32", "i32"), num_warps, BLOCK=1024)
    program.launch([x, out, N], (3,))
    np.testing.assert_array_equal(out, [np.abs(part).max() for part in np.split(x, [1024, 2048])])


@every_target
def test_a_loop_runs_as_often_as_its_bound_says(target: int) -> None:
    """The sum of whole numbers is exact in any order."""
    program = kernels.load(kernels.total, target, ("*fp32", "*fp32", "i32"), BLOCK=256)
    for count in (0, 16, 256, 272, N):
        out = np.full(1, np.nan, np.float32)
        program.launch([np.arange(max(count, 1), dtype=np.float32), out, count], (1,))
        assert out[0] == count * (count - 1) // 2


@every_target
def test_bfloat16_is_rounded_as_torch_rounds(target: int) -> None:
    """Loads, an exact product and a rounding conversion, by reference to torch tensors."""
    x = torch.from_numpy(normal(N)).bfloat16()
    out = torch.zeros_like(x)
    kernels.load(kernels.halve, target, ("*bf16", "*bf16", "i32"), BLOCK=512).launch([x, out, N], (6,))
    assert torch.equal(out, x / 2)


@every_target
def test_a_transposition_through_shared_memory(target: int) -> None:
    """Every element arrives, and the barrier between is needed."""
    x, out = normal(64 * 32).reshape(64, 32), np.zeros((32, 64), np.float32)
    program = kernels.load(kernels.transpose, target, ("*fp32", "*fp32"), ROWS=64, COLUMNS=32)
    program.launch([x, out], (1,))
    np.testing.assert_array_equal(out, x.T)
    with pytest.raises(SharedRaceError, match=r"triton_kernels\.py"):
        program.mutant(r"bar\.sync\s+0;", "").launch([x, out], (1,))


def test_approximate_results_move_under_fuzz_within_their_bounds() -> None:
    """A quotient errs by two units and its root by one more; exact arithmetic would not move at all."""
    x, y = np.abs(normal(N, 1)) + 1, np.abs(normal(N, 2)) + 1
    program = kernels.load(kernels.root_of_quotient, 90, POINTERS_AND_SIZE, BLOCK=1024)
    plain, fuzzed = np.zeros(N, np.float32), np.zeros(N, np.float32)
    program.launch([x, y, plain, N], (3,))
    np.testing.assert_array_equal(plain, np.sqrt(x / y))
    program.launch([x, y, fuzzed, N], (3,), fuzz=7)
    steps = fuzzed.view(np.int32) - plain.view(np.int32)
    assert 0 < np.abs(steps).max() <= 3


def test_tables_of_addresses_reach_their_buffers() -> None:
    """A kernel that loads pointers finds tensors of several sizes, and only those bytes."""
    sizes = np.array([256, 7, 0, 130], np.int32)
    tensors = [torch.zeros(int(size)) for size in sizes]
    memory = Memory()
    table = np.array([memory.address_of(tensor) for tensor in tensors], np.int64)
    program = kernels.load(kernels.add_one_to_all, 90, ("*i64", "*i32"), BLOCK=256)
    program.launch([table, sizes], (4,), memory=memory)
    assert all((tensor == 1).all() for tensor in tensors)
    with pytest.raises(OutOfBoundsError, match=r"behind the end of buffer 1 \(float32\[7\]\)"):
        program.launch([table, sizes + np.int32(1)], (2,), memory=memory, programs=[1])


def test_atomics_of_a_compiled_kernel_add_up() -> None:
    """256 additions fall on four counters."""
    out = np.zeros(4, np.int32)
    kernels.load(kernels.count_up, 90, ("*i32",), BLOCK=256).launch([out], (2,))
    assert out.tolist() == [128] * 4


def test_far_elements_are_reached_by_an_address_before_the_buffer() -> None:
    """A pointer may lie outside as long as accesses do not: so a test can stand at any index."""
    out, values = np.zeros(1024, np.float32), np.ones(1024, np.float32)
    memory, first = Memory(), 2**20
    pointers = [memory.address_of(buffer) - 4 * 1024 * first for buffer in (values, values, out)]
    program = kernels.load(kernels.add, 90, POINTERS_AND_SIZE, BLOCK=1024)
    program.launch([*pointers, 2**31 - 16], (first + 1,), memory=memory, programs=[first])
    assert (out == 2).all()


class TestDefects:
    """Each defect is one that a test of results alone may miss."""

    def test_a_dropped_barrier(self) -> None:
        """Warps that read partial results too early are reported at the reduction's line."""
        program = kernels.load(kernels.largest, 90, ("*fp32", "*fp32", "i32"), BLOCK=1024)
        with pytest.raises(SharedRaceError, match=r"triton_kernels\.py:\d+:\d+ > standard\.py.*another warp"):
            program.mutant(r"bar\.sync\s+0;", "").launch([normal(N), np.zeros(3, np.float32), N], (3,))

    def test_an_off_by_one_mask(self) -> None:
        """`i <= n`, in the half of the block where the buffer ends, reads what lies behind it."""
        program = kernels.load(kernels.add, 90, POINTERS_AND_SIZE, BLOCK=1024)
        wrong = program.mutant(r"setp\.lt\.s32", "setp.le.s32", occurrence=1)
        with pytest.raises(OutOfBoundsError):
            wrong.launch([normal(N), normal(N), normal(N), N], (3,))

    def test_a_short_buffer(self) -> None:
        """One element less than the size says, at the line of the load."""
        program = kernels.load(kernels.add, 90, POINTERS_AND_SIZE, BLOCK=1024)
        with pytest.raises(OutOfBoundsError, match=r"triton_kernels\.py.*16-byte load.*program 2, thread \d+"):
            program.launch([normal(N - 1), normal(N), normal(N), N], (3,))

    def test_a_misaligned_pointer(self) -> None:
        """A kernel compiled for aligned pointers gets a tensor that starts at element 1."""
        program = kernels.load(kernels.add, 90, POINTERS_AND_SIZE, BLOCK=1024)
        with pytest.raises(MisalignedError):
            program.launch([normal(N + 16)[1 : N + 1], normal(N), normal(N), N], (3,))

    def test_a_wrong_shuffle(self) -> None:
        """A butterfly that skips a stage misses the largest value somewhere."""
        program = kernels.load(kernels.largest, 80, ("*fp32", "*fp32", "i32"), 1, BLOCK=1024)
        x, out = normal(N), np.zeros(3, np.float32)
        wrong = program.mutant(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 16,", r"\1, 8,")
        wrong.launch([x, out, N], (3,))
        assert (out != [np.abs(part).max() for part in np.split(x, [1024, 2048])]).any()

    def test_two_programs_on_one_element(self) -> None:
        """A grid step smaller than the block makes neighbours write the same bytes."""
        program = kernels.load(kernels.add, 90, POINTERS_AND_SIZE, BLOCK=1024)
        wrong = program.mutant(r"(shl\.b32\s+%r\d+, %r\d+), 10;", r"\1, 9;")
        buffers = [normal(N), normal(N), normal(N), N]
        with pytest.raises(GlobalRaceError, match="another program"):
            wrong.launch(buffers, (3,))
        wrong.launch(buffers, (3,), checks=Checks(global_races=False))

    def test_a_defect_that_is_not_there_is_refused(self) -> None:
        """A mutation that matches nothing would test nothing."""
        with pytest.raises(ValueError, match="occurs 0 times"):
            kernels.load(kernels.add, 90, POINTERS_AND_SIZE, BLOCK=1024).mutant("wgmma", "")


def test_branches_come_together_again() -> None:
    """Odd and even threads go different ways and both arrive at the store."""
    code = """
    and.b32 %r1, %tid, 1;
    setp.eq.s32 %q0, %r1, 0;
    @%q0 bra $L_even;
    mov.b32 %r2, 5;
    bra.uni $L_join;
    $L_even:
    mov.b32 %r2, 6;
    $L_join:
    mad.wide.u32 %rd0, %tid, 4, %p0;
    st.global.b32 [%rd0], %r2;
    """
    out = np.zeros(64, np.uint32)
    counters = assemble(code, 1, threads=64).launch([out], (1,))
    np.testing.assert_array_equal(out, np.where(np.arange(64) % 2, 5, 6))
    assert counters.instructions["st"] == 2, "the two warps store once each, after they have joined"


def test_each_thread_loops_as_often_as_it_wants() -> None:
    """Thread t counts to t, in programs that run side by side."""
    code = """
    mov.b32 %r1, 0;
    $L_loop:
    setp.ge.u32 %q0, %r1, %tid;
    @%q0 bra $L_done;
    add.s32 %r1, %r1, 1;
    bra $L_loop;
    $L_done:
    mad.wide.u32 %rd0, %tid, 4, %p0;
    atom.global.add.u32 %r3, [%rd0], %r1;
    """
    out = np.zeros(64, np.uint32)
    assemble(code, 1, threads=64).launch([out], (5,))
    np.testing.assert_array_equal(out, 5 * np.arange(64))


def test_a_grid_has_three_axes() -> None:
    """Programs know their place on each."""
    code = """
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ctaid.y;
    mov.u32 %r3, %ctaid.z;
    mov.u32 %r4, %nctaid.x;
    mov.u32 %r5, %nctaid.y;
    mad.lo.s32 %r6, %r3, %r5, %r2;
    mad.lo.s32 %r6, %r6, %r4, %r1;
    setp.eq.s32 %q0, %tid, 0;
    mad.wide.u32 %rd0, %r6, 4, %p0;
    mad.lo.s32 %r7, %r3, 10, %r2;
    mad.lo.s32 %r7, %r7, 10, %r1;
    @%q0 st.global.b32 [%rd0], %r7;
    """
    out = np.zeros((2, 3, 4), np.uint32)
    assemble(code, 1).launch([out], (4, 3, 2))
    np.testing.assert_array_equal(out, [[[100 * z + 10 * y + x for x in range(4)] for y in range(3)] for z in range(2)])


def test_a_kernel_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless loop is a fault, not a test that hangs."""
    monkeypatch.setattr("ptx.program.STEP_LIMIT", 100)
    with pytest.raises(TrapError, match="does not end"):
        assemble("$L_here: bra $L_here;", 1).launch([np.zeros(1)], (1,))


def test_wrong_launches_are_refused() -> None:
    """Another number of warps than compiled for, or more arguments than parameters."""
    program = kernels.load(kernels.add, 90, POINTERS_AND_SIZE, BLOCK=1024)
    with pytest.raises(PtxError, match="wants 128 threads, not 256"):
        program.launch([normal(N), normal(N), normal(N), N], (3,), 8)
    with pytest.raises(PtxError, match="parameters, 9 were given"):
        program.launch([0] * 9, (1,))


def test_a_fault_leaves_the_hosts_buffers_as_they_were() -> None:
    """What a launch wrote before it failed is not copied back."""
    out = np.zeros(N - 1, np.float32)
    with pytest.raises(OutOfBoundsError):
        kernels.load(kernels.add, 90, POINTERS_AND_SIZE, BLOCK=1024).launch([normal(N), normal(N), out, N], (3,))
    assert not out.any()


def test_a_program_is_parsed_once() -> None:
    """Loading the same compiled kernel again gives the same object."""
    kernel = type("Kernel", (), {"asm": {"ptx": assemble("", 1).ptx}, "metadata": type("M", (), {"shared": 0})})
    assert Program.of(kernel) is Program.of(kernel)
