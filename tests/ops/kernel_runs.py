"""Where launches of Triton kernels run: in the emulator of a GPU's machine code, or on the GPU at hand.

A launch is compiled as `lisa_kernels` would start it, once per kernel, constants and target, and runs on the tensors
it names by reference. The tensors lie in memory that is poisoned around them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ptx import Memory, Program
from torch import Tensor

from lisa_kernels.ops.tiles import COLUMNS, WARP, Launch, warp_size

# The modules with kernels, each after those that it imports from.
MODULES = ("tiles", "blockwise8", "adamw8", "fold", "grad_norm", "project", "resting")
# Bytes before and behind a tensor that nothing may change; of all bits set, which as a float is NaN.
MARGIN = 256
POISON = 0xFF

# What is imported here skips the tests that import this module, with the reason, where Triton is absent.
pytest.importorskip("triton", reason="Triton is not installed: it is for Linux only")
kernel_code: Any = importlib.import_module("bench.kernel_code")


def module_name(name: str) -> str:
    """Return where an operation's kernels live."""
    return f"lisa_kernels.ops.{name}.triton_kernel"


class Recipe:
    """All that a compiled kernel depends on: launches that differ in values only have equal ones."""

    def __init__(self, launch: Launch, sm: int) -> None:
        self.launch, self.sm = launch, sm
        self._key = (*kernel_code.signature(launch).items(), *launch.constants.items(), *launch.options().items())

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Recipe) and self.launch.kernel is other.launch.kernel
        return same and (self.sm, self._key) == (other.sm, other._key)

    def __hash__(self) -> int:
        return hash((id(self.launch.kernel), self.sm, self._key))


@cache
def program_of(recipe: Recipe) -> Program:
    """Compile a kernel for a compute capability, once."""
    return Program.of(kernel_code.compile_for(recipe.launch, recipe.sm))


@dataclass(frozen=True)
class Machine:
    """A compute capability that is emulated, or with `sm` None the GPU at hand.

    fuzz: seeds errors of approximate instructions. edit: makes a defect in a compiled kernel. kernels: modules with
    defects in place of the package's own.
    """

    sm: int | None
    fuzz: int | None = None
    edit: Callable[[Program], Program] | None = None
    kernels: Mapping[str, ModuleType] = field(default_factory=dict)

    def __str__(self) -> str:
        return "cuda" if self.sm is None else f"emulated-sm_{self.sm}"

    @property
    def device(self) -> torch.device:
        """Where tensors must lie."""
        return torch.device("cuda" if self.sm is None else "cpu")

    @property
    def warp(self) -> int:
        """Threads that run in step."""
        return WARP if self.sm is not None else warp_size(self.device)

    def module(self, name: str) -> ModuleType:
        """Return an operation's kernels."""
        return self.kernels.get(name) or importlib.import_module(module_name(name))

    def run(
        self,
        launches: Sequence[Launch],
        tensors: Iterable[Tensor] = (),
        displaced: Mapping[int | str, int] | None = None,
        only: Sequence[int] | None = None,
    ) -> None:
        """Run launches in order.

        tensors: those whose addresses stand in tables. displaced: bytes that the addresses in a table's column, or a
        pointer of that name, lie before the tensor, whose elements then have indices beyond those of a tensor that fits
        here. only: the programs to run, where their number is beyond what can be run; emulated.
        """
        tensors = list(tensors)
        for launch in launches:
            if self.sm is not None:
                self._emulate(launch, tensors, displaced or {}, only)
                continue
            if displaced:
                table = displace(launch.arguments["table"], displaced)
                launch = replace(launch, arguments={**launch.arguments, "table": table})
            launch.run()

    def _emulate(
        self, launch: Launch, tensors: list[Tensor], displaced: Mapping[int | str, int], only: Sequence[int] | None
    ) -> None:
        assert self.sm is not None
        memory = Memory()
        for tensor in tensors:
            memory.address_of(tensor)
        values = []
        for name in launch.kernel.arg_names:
            if name in launch.constants:
                continue
            value = launch.arguments[name]
            if name == "table":
                value = displace(memory.translated(value), displaced)
            elif name in displaced:
                value = memory.address_of(value) - displaced[name]
            values.append(value)
        program = program_of(Recipe(launch, self.sm))
        program = program if self.edit is None else self.edit(program)
        grid = launch.programs if only is None else max(only) + 1
        program.launch(values, (grid,), launch.num_warps, memory=memory, programs=only, fuzz=self.fuzz)


# What the fast tests run on.
MACHINES = [Machine(90), *([Machine(None)] if torch.cuda.is_available() else [])]


def displace(table: Tensor, displaced: Mapping[int | str, int]) -> Tensor:
    """Return a table whose addresses, by column, lie so many bytes earlier."""
    shift = torch.tensor([displaced.get(column, 0) for column in range(COLUMNS)], device=table.device)
    return (table.view(-1, COLUMNS) - shift).view(table.shape)


class Poisoned:
    """Copies of tensors on a device, each amid bytes that must stay as they are.

    shift: elements that each copy begins behind an aligned place.
    """

    def __init__(self, device: torch.device, shift: int = 0) -> None:
        self.device, self.shift = device, shift
        self._copies: list[tuple[Tensor, int, int]] = []
        self.tensors: list[Tensor] = []

    def place(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of the tensors."""
        return [self._place(tensor) for tensor in tensors]

    def empty(self, like: Tensor) -> Tensor:
        """Return a tensor of the same size and dtype that holds poison."""
        return self._place(torch.full((like.nbytes,), POISON, dtype=torch.uint8).view(like.dtype))

    def _place(self, tensor: Tensor) -> Tensor:
        first = MARGIN + self.shift * tensor.itemsize
        whole = torch.full((first + tensor.nbytes + MARGIN,), POISON, dtype=torch.uint8, device=self.device)
        inside = whole[first : first + tensor.nbytes].view(tensor.dtype)
        inside.copy_(tensor.reshape(-1))
        self._copies.append((whole, first, first + tensor.nbytes))
        self.tensors.append(inside)
        return inside

    def assert_untouched(self) -> None:
        """Fail if a byte outside the tensors has changed."""
        for number, (whole, first, last) in enumerate(self._copies):
            outside = torch.cat([whole[:first], whole[last:]])
            assert (outside == POISON).all(), f"memory around tensor {number} was written"


def edited_kernels(module: str, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return the emulated sm_90 with kernels in whose source `old`, found once in a module, was replaced by `new`.

    Triton reads a function's source from its file, so the copies are written to one.
    """
    kernels = {}
    for name in MODULES:
        source = Path(str(importlib.import_module(module_name(name)).__file__)).read_text()
        if name == module:
            assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {name}"
            source = source.replace(old, new)
        path = folder / name / "triton_kernel.py"
        path.parent.mkdir()
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"edited_{name}", path)
        assert spec is not None
        assert spec.loader is not None
        kernels[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"edited_{name}", kernels[name])
        spec.loader.exec_module(kernels[name])
        # The modules that come after this one import its functions.
        monkeypatch.setitem(sys.modules, module_name(name), kernels[name])
    return Machine(90, kernels=kernels)
