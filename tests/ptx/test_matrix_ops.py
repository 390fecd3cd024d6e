"""Matrix products and transposed loads, as Triton compiles them and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from . import triton_kernels as kernels
from .assembly import assemble
from .faults import InactiveLaneError, OutOfBoundsError, PtxError

# Products of bfloat16 and float16 are exact in float32; 32 of them are summed.
SUMS = 32 * 2.0**-24
# TF32 keeps ten bits of each factor.
TF32_PRODUCTS = 2 * 2.0**-10


@pytest.mark.parametrize("target", kernels.DOT_TARGETS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, SUMS), (torch.float16, SUMS), (torch.float32, TF32_PRODUCTS)],
    ids=["bf16", "fp16", "tf32"],
)
def test_a_compiled_product_equals_the_exact_one(target: int, dtype: torch.dtype, tolerance: float) -> None:
    """Within the rounding of the factors and of the sum, relative to the sum of magnitudes."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(32, 32, generator=generator).to(dtype), torch.randn(32, 64, generator=generator).to(dtype)
    out = torch.full((32, 64), torch.nan)
    pointer = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    program = kernels.load(kernels.product, target, (pointer, pointer, "*fp32"), M=32, N=64, K=32)
    counters = program.launch([a, b, out], (1,))
    magnitude = a.double().abs() @ b.double().abs()
    assert ((out.double() - a.double() @ b.double()).abs() <= tolerance * magnitude).all()
    assert counters.instructions["mma"] > 0


def test_a_wrong_fragment_gives_a_wrong_product() -> None:
    """Swapping two registers of the left factor must not go unseen."""
    a, b = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    out = torch.zeros(32, 32)
    program = kernels.load(kernels.product, 80, ("*bf16", "*bf16", "*fp32"), M=32, N=32, K=32)
    swapped = program.mutant(r"(mma\.sync[^{]*\{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2")
    swapped.launch([a, b, out], (1,))
    assert not torch.allclose(out, a.float() @ b.float(), rtol=1e-3, atol=1e-3)


MATRICES = """
    mov.b32 %r0, global_smem;
    mad.lo.s32 %r1, %tid, 16, %r0;
    mad.lo.s32 %r2, %tid, 4, %r0;
    mad.wide.u32 %rd0, %tid, 4, %p0;
    ld.global.b32 %r3, [%rd0];
    st.shared.b32 [%r2], %r3;
    bar.sync 0;
    {transfer}
    bar.sync 0;
    mad.wide.u32 %rd1, %tid, 4, %p1;
    st.global.b32 [%rd1], %r4;
"""
PLAIN = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r1];"
TRANSPOSED = "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r4}, [%r1];"
STORED = f"{PLAIN}\n stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%r1], {{%r4}};\n ld.shared.b32 %r4, [%r2];"


@pytest.mark.parametrize(
    ("transfer", "transposed"),
    [(PLAIN, False), (TRANSPOSED, True), (STORED, True)],
    ids=["load", "transposed load", "transposed store"],
)
def test_an_eight_by_eight_matrix_in_registers(transfer: str, transposed: bool) -> None:
    """Lane 4r + c holds elements 2c and 2c + 1 of row r; transposing swaps rows and columns."""
    matrix, out = np.arange(64, dtype=np.uint16).reshape(8, 8), np.zeros((8, 8), np.uint16)
    assemble(MATRICES.format(transfer=transfer), 2, shared_bytes=128).launch([matrix, out], (1,))
    np.testing.assert_array_equal(out, matrix.T if transposed else matrix)


def test_matrix_loads_have_bounds_and_want_whole_warps() -> None:
    """Row addresses are checked like any access, and a warp takes part as a whole or not at all."""
    buffers = [np.zeros(32, np.uint32), np.zeros(32, np.uint32)]
    with pytest.raises(OutOfBoundsError):
        assemble(MATRICES.format(transfer=PLAIN.replace("%r1]", "%r1+16]")), 2, shared_bytes=128).launch(buffers, (1,))
    partly = f"setp.lt.u32 %q1, %tid, 16;\n @%q1 {PLAIN}"
    with pytest.raises(InactiveLaneError):
        assemble(MATRICES.format(transfer=partly), 2, shared_bytes=128).launch(buffers, (1,))


def test_products_on_other_units_are_refused() -> None:
    """Hopper's wgmma is not emulated, and loading such a kernel says so."""
    with pytest.raises(PtxError, match="does not know"):
        kernels.load(kernels.product, 90, ("*bf16", "*bf16", "*fp32"), M=64, N=64, K=64)
