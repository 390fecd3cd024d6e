"""Kernels compiled ahead of time are the ones that run, and what is read from their machine code is right."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from bench.kernel_code import (
    KERNELS,
    Instruction,
    KernelVariant,
    _instructions,
    _main_path,
    _width,
    compile_for,
    occupancy,
    resources,
    signature,
)

BY_NAME = {variant.name: variant for variant in KERNELS}
# One variant of each kernel.
EACH_KERNEL = (
    "adamw8/one/bf16-bf16", "adamw8/many/fp32-fp32", "adamw32/bf16-bf16", "grad_norm/bf16", "fold/bf16", "quantize/m",
    "dequantize/v",
)  # fmt: skip


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let Triton's own launch path compile for sm_90 wherever this runs; kernels forget it afterwards."""
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    monkeypatch.setattr(importlib.import_module("triton.runtime").driver, "_active", driver)
    kernels = [variant.launch(90).kernel for variant in KERNELS]
    for kernel in kernels:
        kernel.device_caches.clear()
    yield
    for kernel in kernels:
        kernel.device_caches.clear()


def compiled_by_launching(variant: KernelVariant, **changed: Any) -> Any:
    """Return what Triton compiles, or finds compiled, when the variant is launched with some other arguments."""
    launch = variant.launch(90)
    arguments = {**launch.arguments, **changed}
    return launch.kernel.run(grid=(launch.programs,), warmup=True, **arguments, **launch.constants, **launch.options())


def code(compiled: Any) -> str:
    """Return a kernel's PTX up to the names of its source files, which Triton's cache keeps from another checkout."""
    before, found, _ = compiled.asm["ptx"].partition("\t.file\t")
    assert found
    return str(before)


@pytest.mark.parametrize("name", EACH_KERNEL)
def test_what_is_inspected_is_what_runs(no_gpu_needed: None, name: str) -> None:
    """Compiling ahead of time gives the code that launching the same operation compiles, to the letter."""
    variant = BY_NAME[name]
    ahead = compile_for(variant.launch(90), 90)
    assert code(compiled_by_launching(variant)) == code(ahead)


def test_other_values_and_addresses_find_the_kernel_compiled(no_gpu_needed: None) -> None:
    """Counts, rows, tiles and addresses that differ in all that Triton looks at lead to the same kernel."""
    variant = BY_NAME["adamw8/one/bf16-bf16"]
    first = compiled_by_launching(variant)
    odd = torch.zeros(100)[1:]
    for changed in ({"count": 1}, {"count": 1 << 40, "row": 16}, {"first_tile": 3}, {"scalars": odd}):
        assert compiled_by_launching(variant, **changed) is first


def test_another_dtype_is_another_kernel(no_gpu_needed: None) -> None:
    """Negative control of the above."""
    variant = BY_NAME["adamw8/one/bf16-bf16"]
    assert compiled_by_launching(variant) is not compiled_by_launching(variant, grad=torch.zeros(100))


def test_names_tell_variants_apart() -> None:
    """Budgets and results are kept by name."""
    assert len(BY_NAME) == len(KERNELS)


def test_signatures_name_types_in_order() -> None:
    """Types of run-time arguments as Triton spells them, constants as such."""
    launch = BY_NAME["adamw8/one/bf16-fp32"].launch(90)
    types = signature(launch)
    assert list(types) == launch.kernel.arg_names
    assert (types["param"], types["grad"], types["m_codes"], types["count"]) == ("*bf16", "*fp32", "*u8", "i64")
    assert types["BLOCK"] == "constexpr"


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [(90, 64, 0, 4, 0.5), (90, 32, 0, 4, 1.0), (90, 65, 0, 4, 0.438), (86, 64, 0, 4, 0.667),
     (80, 32, 100 << 10, 8, 0.125), (90, 16, 0, 1, 0.5)],
    ids=["half", "full", "a register more", "fewer warps", "shared memory", "program slots"],
)  # fmt: skip
def test_occupancy_follows_the_scarcest_resource(
    target: int, registers: int, shared: int, warps: int, expected: float
) -> None:
    """Registers in pieces of eight, shared memory, program slots and warps."""
    assert occupancy(target, registers, shared, warps) == expected


@pytest.mark.parametrize(
    ("opcode", "width"),
    [("LDG.E.128", 16), ("LDG.E.64.CONSTANT", 8), ("LDG.E", 4), ("STG.E.U16", 2), ("LDG.E.U8", 1)],
)
def test_widths_are_read_from_opcodes(opcode: str, width: int) -> None:
    """Bytes per thread."""
    assert _width(opcode) == width


def listing(*lines: str) -> list[Instruction]:
    """Return instructions of a listing as NVIDIA's disassembler prints them; labels end with a colon."""
    return _instructions("\n".join(line if line.endswith(":") else f"        /*0010*/    {line} ;" for line in lines))


def opcodes(code: list[Instruction]) -> list[str] | None:
    path = _main_path(code)
    return None if path is None else [instruction.opcode for instruction in path]


def test_the_path_of_a_program_with_work_is_found() -> None:
    """Past an early exit, through the branch with the accesses, without what stands behind the end."""
    code = listing(
        "@P0 EXIT", "@!P1 BRA `(.L_x_1)", "FADD R0, R0, R1", "FADD R0, R0, R1", "BRA `(.L_x_2)",
        ".L_x_1:", "STG.E [R2], R0", ".L_x_2:", "EXIT", ".L_x_3:", "BRA `(.L_x_3)", "NOP",
    )  # fmt: skip
    assert opcodes(code) == ["EXIT", "BRA", "STG.E", "EXIT"]


@pytest.mark.parametrize("branch", ["@P0 BRA `(.L_x_0)", "BRA.U UP0, `(.L_x_0)"], ids=["lane", "warp"])
def test_code_with_a_loop_has_no_path(branch: str) -> None:
    """How often a loop repeats is not in the code."""
    assert opcodes(listing(".L_x_0:", "FADD R0, R0, R1", branch, "EXIT")) is None


def test_resources_of_the_main_kernel() -> None:
    """The fused step with 16-byte accesses, without spills, memory-bound by its instructions on a fast GPU."""
    variant = BY_NAME["adamw8/one/bf16-bf16"]
    launch = variant.launch(90)
    found = resources(compile_for(launch, 90), launch, 90, variant.elements_per_program)
    assert (found.spill_bytes, found.local_accesses, found.shared_bytes) == (0, 0, 0)
    assert (found.widest_load_bytes, found.widest_store_bytes) == (16, 16)
    assert found.instructions_per_element is not None
    assert 40 < found.instructions_per_element <= 86


def without_target(compiled: Any) -> str:
    """Return the PTX, apart from the name of what it is for, and from where its source was when it was compiled."""
    code, _, _ = compiled.asm["ptx"].partition("\t.section\t.debug")
    return re.sub(r"\.target\s+sm_\d+a?|\.file\s+\d+ .*", "", code)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in EACH_KERNEL else pytest.mark.slow) for name in BY_NAME]
)
def test_two_capabilities_share_their_code(name: str) -> None:
    """What is emulated of sm_86 holds for sm_89, which the sweeps therefore leave out; sm_90 is a target of its own."""
    launch = BY_NAME[name].launch(86)
    first, second = (without_target(compile_for(launch, target)) for target in (86, 89))
    assert first == second


def test_another_capability_has_other_code() -> None:
    """Negative control: the comparison sees more than the name of the target."""
    launch = BY_NAME["adamw8/one/bf16-bf16"].launch(86)
    assert without_target(compile_for(launch, 86)) != without_target(compile_for(launch, 90))


@pytest.mark.slow
def test_the_main_kernel_compiles_for_amd() -> None:
    """A warp of 64 threads, no spills."""
    variant = BY_NAME["adamw8/one/bf16-bf16"]
    launch = variant.launch("gfx942")
    found = resources(compile_for(launch, "gfx942"), launch, "gfx942", variant.elements_per_program)
    assert launch.num_warps * 64 == variant.launch(90).num_warps * 32
    assert (found.spill_bytes, found.local_accesses, found.widest_load_bytes) == (0, 0, 16)
