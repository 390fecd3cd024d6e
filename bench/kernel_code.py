"""The machine code of every Triton kernel, without a GPU: compiled ahead of time, its resources read from it.

`KERNELS` holds the launches that the operations themselves make for small tensors of each dtype, so that what is
compiled and inspected here is what runs there: same constants, same options, same argument types. Arguments are never
specialised by value or alignment, so a type is all that a signature needs.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lisa_kernels.ops.resting import GROUP, RECORD, scale_count
from lisa_kernels.ops.tiles import ELEMENT, VECTOR, WHOLE, Launch

# Compute capabilities of NVIDIA GPUs, names of AMD's.
TARGETS: tuple[int | str, ...] = (80, 86, 89, 90, 100, 120, "gfx942")
ACCESS_NAMES = {WHOLE: "whole", VECTOR: "vector", ELEMENT: "element"}
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.uint8: "u8", torch.int16: "i16", torch.int64: "i64",
}  # fmt: skip
# Elements of the tensors for which launches are made: whole tiles, and a part of one.
WHOLE_TILES, PART_OF_TILE, ODD_PART = 1 << 17, 1 << 10, (1 << 10) - 1


class Multiprocessor(NamedTuple):
    """What one multiprocessor of a compute capability holds (CUDA programming guide, table of technical limits)."""

    warps: int
    programs: int
    shared_bytes: int
    registers: int = 65536


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 << 10), 86: Multiprocessor(48, 16, 100 << 10), 89: Multiprocessor(48, 24, 100 << 10),
    90: Multiprocessor(64, 32, 228 << 10), 100: Multiprocessor(64, 32, 228 << 10),
    120: Multiprocessor(48, 24, 100 << 10),
}  # fmt: skip
# Registers are given to warps in pieces of this many per thread, and each program takes this much shared memory more.
REGISTER_PIECE, SYSTEM_SHARED_BYTES = 8, 1 << 10


@dataclass(frozen=True)
class KernelVariant:
    """One kernel as one operation launches it for one combination of dtypes.

    `make` returns the launch for a device with so many threads in a warp; `bytes_per_element`: memory traffic of the
    formats alone, reads and writes.
    """

    name: str
    make: Callable[[int], Launch]
    bytes_per_element: float

    def launch(self, target: int | str) -> Launch:
        """Return the launch on a target."""
        return self.make(warp_of(target))

    @property
    def elements_per_program(self) -> int:
        """The same on all targets."""
        constants = self.make(32).constants
        # A tile of consecutive elements, or of a matrix, of a fold's weight or a projection's result.
        tile = ("ROWS", "LANES", "VECTOR", "STEPS", "PASSES")
        names = tile if "LANES" in constants else {*constants} & {*"RMN"}
        return prod(constants[name] for name in names)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes; None where the target's tools do not tell.

    `instructions_per_element`: machine instructions that the threads of a program with work execute, over its
    elements; a warp's issue slots per 32 elements are as many. None for code with a loop.
    `occupancy`: share of a multiprocessor's warps that registers, shared memory and program slots let run at once.
    """

    registers: int
    spill_bytes: int
    local_accesses: int
    shared_bytes: int
    widest_load_bytes: int
    widest_store_bytes: int
    instructions_per_element: float | None
    occupancy: float | None


def warp_of(target: int | str) -> int:
    """Return how many threads run in step on a target."""
    return 64 if isinstance(target, str) and target.startswith("gfx9") else 32


def signature(launch: Launch) -> dict[str, str]:
    """Return the types of a launch's arguments as Triton names them, in the kernel's order."""
    types = {name: f"*{TYPES[a.dtype]}" if isinstance(a, Tensor) else "i64" for name, a in launch.arguments.items()}
    types |= dict.fromkeys(launch.constants, "constexpr")
    return {name: types[name] for name in launch.kernel.arg_names}


def compile_for(launch: Launch, target: int | str) -> Any:
    """Compile a launch's kernel for a target; returns Triton's compiled kernel, with `asm` and `metadata`."""
    compiler = importlib.import_module("triton.compiler")
    backends = importlib.import_module("triton.backends.compiler")
    hip = isinstance(target, str)
    source = compiler.ASTSource(fn=launch.kernel, signature=signature(launch), constexprs=launch.constants)
    gpu = backends.GPUTarget("hip" if hip else "cuda", target, warp_of(target))
    return importlib.import_module("triton").compile(source, target=gpu, options=launch.options())


def resources(kernel: Any, launch: Launch, target: int | str, elements_per_program: int) -> Resources:
    """Read a compiled kernel's resources from its machine code."""
    if isinstance(target, str):
        return _amd_resources(kernel.asm["amdgcn"], int(kernel.metadata.shared))
    usage, listing = _disassemble(kernel.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, f"no register count in: {usage}"
    code = _instructions(listing)
    path = _main_path(code)
    loads = [_width(i.opcode) for i in code if i.opcode.startswith(("LDG", "LD."))]
    stores = [_width(i.opcode) for i in code if i.opcode.startswith(("STG", "ST."))]
    registers, shared = int(found.group(1)), int(kernel.metadata.shared)
    slots = None if path is None else round(len(path) * 32 * launch.num_warps / elements_per_program, 1)
    return Resources(
        registers=registers,
        spill_bytes=int(found.group(2)),
        local_accesses=sum(i.opcode.startswith(("LDL", "STL")) for i in code),
        shared_bytes=shared,
        widest_load_bytes=max(loads, default=0),
        widest_store_bytes=max(stores, default=0),
        instructions_per_element=slots,
        occupancy=occupancy(target, registers, shared, launch.num_warps),
    )


def occupancy(target: int, registers: int, shared_bytes: int, num_warps: int) -> float:
    """Return the share of a multiprocessor's warps that can be resident at once."""
    limits = MULTIPROCESSORS[target]
    per_warp = -(-registers // REGISTER_PIECE) * REGISTER_PIECE * 32
    programs = min(
        limits.warps // num_warps,
        limits.programs,
        limits.registers // per_warp // num_warps,
        limits.shared_bytes // (shared_bytes + SYSTEM_SHARED_BYTES),
    )
    return round(programs * num_warps / limits.warps, 3)


class Instruction(NamedTuple):
    """One machine instruction: its opcode with modifiers, whether a predicate guards it, and a branch's label."""

    opcode: str
    guarded: bool
    target: int | None


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Return the resource usage and the listing that NVIDIA's tools in Triton's wheel print of a cubin."""
    tools = Path(str(importlib.import_module("triton").__file__)).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
        listing = subprocess.run([tools / "nvdisasm", "-c", path], capture_output=True, text=True, check=True)
    return usage.stdout + usage.stderr, listing.stdout


def _instructions(listing: str) -> list[Instruction]:
    """Return a listing's instructions in order, each branch with the index of the instruction it goes to."""
    lines: list[tuple[str, bool, str]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        label = re.match(r"^(\.L_x_\d+):", line)
        code = re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*)", line)
        if label is not None:
            labels[label.group(1)] = len(lines)
        elif code is not None and code.group(2) != "NOP":
            # Branches of the whole warp have modifiers on some targets; all other opcodes keep theirs.
            opcode = "BRA" if code.group(2).startswith("BRA.") else code.group(2)
            lines.append((opcode, code.group(1) is not None, code.group(3)))
    instructions = []
    for opcode, guarded, operands in lines:
        name = re.search(r"\.L_x_\d+", operands)
        # A branch of the whole warp may carry its condition as an operand.
        guarded = guarded or (opcode == "BRA" and "P" in operands.partition("`")[0])
        instructions.append(Instruction(opcode, guarded, labels[name.group(0)] if name is not None else None))
    return instructions


def _main_path(code: list[Instruction]) -> list[Instruction] | None:
    """Return the instructions that a program with work executes, None if some of them repeat.

    Of all paths from the entry to an exit, the one with the most accesses to memory, then the longest.
    """
    end = len(code)
    scores: list[tuple[int, int]] = [(-end, 0)] * (end + 1)
    following: list[int | None] = [None] * (end + 1)
    for index in range(end - 1, -1, -1):
        opcode, guarded, target = code[index]
        choices: list[tuple[tuple[int, int], int | None]] = []
        if opcode == "EXIT":
            choices.append(((0, 0), None))
        elif opcode == "BRA" and target is not None:
            if target <= index and not (target == index and not guarded):
                return None
            if target > index:
                choices.append((scores[target], target))
        if guarded or opcode not in ("EXIT", "BRA"):
            choices.append((scores[index + 1], index + 1))
        (accesses, length), following[index] = max(choices, default=((-end, 0), None), key=lambda choice: choice[0])
        scores[index] = (accesses + opcode.startswith(("LDG", "STG")), length + 1)
    path: list[Instruction] = []
    place: int | None = 0
    while place is not None and place < end:
        path.append(code[place])
        place = following[place]
    return path


def _width(opcode: str) -> int:
    """Return the bytes that one thread moves with a load or store."""
    found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", opcode)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[found.group(1)] if found else 4


def _amd_resources(assembly: str, shared_bytes: int) -> Resources:
    """Read what AMD's assembly states in its metadata, and the widest accesses from its opcodes."""

    def stated(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, f"the assembly does not state {name}"
        return int(found.group(1))

    dwords = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}
    loads = [
        dwords.get(kind, 4) for kind in re.findall(r"\b(?:global|buffer|flat)_load_(\w+?)(?:_d16\w*)?\s", assembly)
    ]
    stores = [
        dwords.get(kind, 4) for kind in re.findall(r"\b(?:global|buffer|flat)_store_(\w+?)(?:_d16\w*)?\s", assembly)
    ]
    return Resources(
        registers=stated("vgpr_count"),
        spill_bytes=stated("private_segment_fixed_size"),
        local_accesses=stated("vgpr_spill_count") + stated("sgpr_spill_count"),
        shared_bytes=shared_bytes,
        widest_load_bytes=max(loads, default=0),
        widest_store_bytes=max(stores, default=0),
        instructions_per_element=None,
        occupancy=None,
    )


def _zeros(n: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(n, dtype=dtype)


def _adamw8(count: int, tensors: int, param: torch.dtype, grad: torch.dtype, block_size: int, stochastic: bool,
            part: int = -1) -> Callable[[int], Launch]:  # fmt: skip
    """Return a maker of one of the launches of a step on equal tensors, by default the last."""
    kernels = importlib.import_module("lisa_kernels.ops.adamw8.triton_kernel")
    blocks = -(-count // block_size)

    def make(warp: int) -> Launch:
        dtypes = (param, grad, torch.uint8, torch.float32, torch.uint8, torch.float32)
        sizes = (count, count, count, blocks, count, blocks)
        lists = [[_zeros(size, dtype)] * tensors for size, dtype in zip(sizes, dtypes)]
        keys, skip = _zeros(tensors, torch.int64), torch.zeros((), dtype=torch.bool)
        scalars = torch.zeros((tensors, 8))
        launches = kernels.adamw8_launches(*lists, scalars, keys, skip, block_size, stochastic, warp)
        launch: Launch = launches[part]
        return launch

    return make


def _adamw32(count: int, param: torch.dtype, grad: torch.dtype) -> Callable[[int], Launch]:
    kernels = importlib.import_module("lisa_kernels.ops.adamw8.triton_kernel")

    def make(warp: int) -> Launch:
        lists = [[_zeros(count, dtype)] for dtype in (param, grad, torch.float32, torch.float32)]
        keys, skip = _zeros(1, torch.int64), torch.zeros((), dtype=torch.bool)
        launch: Launch = kernels.adamw32_launches(*lists, torch.zeros((1, 8)), keys, skip, True, warp)[-1]
        return launch

    return make


def _grad_norm(count: int, grad: torch.dtype) -> Callable[[int], Launch]:
    kernels = importlib.import_module("lisa_kernels.ops.grad_norm.triton_kernel")

    def make(warp: int) -> Launch:
        launch: Launch = kernels.grad_norm_launches([_zeros(count, grad)], True, warp)[-1]
        return launch

    return make


def _codec(name: str, signed: bool) -> Callable[[int], Launch]:
    kernels = importlib.import_module("lisa_kernels.ops.blockwise8.triton_kernel")
    n = WHOLE_TILES
    values, codes, absmax = _zeros(n, torch.float32), _zeros(n, torch.uint8), _zeros(n // 256, torch.float32)

    def make(warp: int) -> Launch:
        if name == "quantize":
            launch: Launch = kernels.quantize_launch(values, codes, absmax, signed, 256, _zeros(1, torch.int64), warp)
        else:
            launch = kernels.dequantize_launch(codes, absmax, values, signed, 256, warp)
        return launch

    return make


def _resting(name: str, dtype: torch.dtype, kind: str) -> Callable[[int], Launch]:
    kernels = importlib.import_module("lisa_kernels.ops.resting.triton_kernel")
    n = WHOLE_TILES
    values, codes = _zeros(n, dtype), _zeros(n if kind == "int8" else n // 2, torch.uint8)
    scales = _zeros(scale_count(n), torch.uint8)

    def make(warp: int) -> Launch:
        if name == "quantize":
            launch: Launch = kernels.quantize_launch(values, codes, scales, kind, warp)
        else:
            launch = kernels.dequantize_launch(codes, scales, values, kind, warp)
        return launch

    return make


# The matrix of which dot kernels' traffic is told, and its rank.
ROWS, COLUMNS, RANK = 4096, 11008, 128


def _fold(dtypes: Sequence[torch.dtype], columns: int = 256, remainder: bool = False) -> Callable[[int], Launch]:
    """Return a maker of the launch on a weight, a left and a right factor of these dtypes."""
    kernels = importlib.import_module("lisa_kernels.ops.fold.triton_kernel")
    shapes = ((256, columns), (RANK, 256), (RANK, columns))

    def make(warp: int) -> Launch:
        factors = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes)]
        rest = torch.zeros(shapes[0], dtype=torch.int16) if remainder else None
        launch: Launch = kernels.fold_launch(*factors, torch.ones(()), _zeros(1, torch.int64), rest, True, warp)
        return launch

    return make


def _fold_variants() -> Iterator[KernelVariant]:
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    for weight in (bf16, fp32, fp16):
        name, dtypes = f"fold/{TYPES[weight]}", (weight, fp32, weight)
        traffic = round(2 * weight.itemsize + RANK * (4 / COLUMNS + weight.itemsize / ROWS), 2)
        yield KernelVariant(name, _fold(dtypes), traffic)
        yield KernelVariant(f"{name}/element", _fold(dtypes, 255), traffic)
        if weight == bf16:
            yield KernelVariant(f"{name}/transposed", _fold((bf16, bf16, fp32)), traffic)
            yield KernelVariant(f"{name}/master", _fold(dtypes, remainder=True), traffic + 4)


def _project(basis: torch.dtype, gradient: torch.dtype, transposed: bool = False) -> Callable[[int], Launch]:
    kernels = importlib.import_module("lisa_kernels.ops.project.triton_kernel")

    def make(warp: int) -> Launch:
        full = torch.zeros((1024, 1024), dtype=gradient)
        given = full.t() if transposed else full
        launch: Launch = kernels.project_launch(torch.zeros((RANK, 1024), dtype=basis), given, warp)
        return launch

    return make


def _project_variants() -> Iterator[KernelVariant]:
    fp32, bf16 = torch.float32, torch.bfloat16
    for basis, gradient in ((bf16, bf16), (fp32, fp32), (bf16, fp32)):
        traffic = round(gradient.itemsize + RANK * (basis.itemsize / ROWS + 4 / COLUMNS), 2)
        for transposed in (False, True):
            name = f"project/{TYPES[basis]}-{TYPES[gradient]}{'/transposed' if transposed else ''}"
            yield KernelVariant(name, _project(basis, gradient, transposed), traffic)


def _bytes8(param: torch.dtype, grad: torch.dtype, block_size: int) -> float:
    return 2 * param.itemsize + grad.itemsize + 4 + 16 / block_size


def _variants() -> Iterator[KernelVariant]:
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    for param, grad in ((bf16, bf16), (fp32, fp32), (fp16, fp16), (bf16, fp32), (fp32, bf16)):
        name, traffic = f"{TYPES[param]}-{TYPES[grad]}", _bytes8(param, grad, 256)
        yield KernelVariant(f"adamw8/one/{name}", _adamw8(WHOLE_TILES, 1, param, grad, 256, True), traffic)
        yield KernelVariant(f"adamw8/many/{name}", _adamw8(WHOLE_TILES, 2, param, grad, 256, True), traffic)
        moments = 16
        yield KernelVariant(
            f"adamw32/{name}", _adamw32(WHOLE_TILES, param, grad), 2 * param.itemsize + grad.itemsize + moments
        )
    for dtype in (bf16, fp32):
        traffic = _bytes8(dtype, dtype, 256)
        name = f"{TYPES[dtype]}-{TYPES[dtype]}"
        yield KernelVariant(f"adamw8/vector/{name}", _adamw8(PART_OF_TILE, 1, dtype, dtype, 256, True), traffic)
        yield KernelVariant(f"adamw8/element/{name}", _adamw8(ODD_PART, 1, dtype, dtype, 256, True), traffic)
        yield KernelVariant(f"adamw8/nearest/{name}", _adamw8(WHOLE_TILES, 1, dtype, dtype, 256, False), traffic)
        for block in (64, 2048, 16384):
            make = _adamw8(WHOLE_TILES, 1, dtype, dtype, block, True)
            # A block larger than a tile is read twice, its gradient and codes.
            twice = dtype.itemsize + 2 if block > 4096 else 0
            yield KernelVariant(f"adamw8/block-{block}/{name}", make, _bytes8(dtype, dtype, block) + twice)
    for dtype in (bf16, fp32, fp16):
        yield KernelVariant(f"grad_norm/{TYPES[dtype]}", _grad_norm(WHOLE_TILES, dtype), dtype.itemsize)
    for kind, signed in (("m", True), ("v", False)):
        yield KernelVariant(f"quantize/{kind}", _codec("quantize", signed), 9 + 4 / 256)
        yield KernelVariant(f"dequantize/{kind}", _codec("dequantize", signed), 5 + 4 / 256)
    for dtype in (bf16, fp32):
        for kind, size in (("int8", 1.0), ("nf4", 0.5)):
            traffic = dtype.itemsize + size + RECORD / GROUP
            yield KernelVariant(
                f"resting/quantize/{kind}/{TYPES[dtype]}", _resting("quantize", dtype, kind), dtype.itemsize + traffic
            )
            yield KernelVariant(
                f"resting/dequantize/{kind}/{TYPES[dtype]}", _resting("dequantize", dtype, kind), traffic
            )
    yield from _fold_variants()
    yield from _project_variants()


KERNELS: tuple[KernelVariant, ...] = tuple(_variants())
