"""Who may import whom, read from the source with `ast`: the arrows between the package's rooms."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "lisa_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))

# For each room, the rooms of the package that it may import.
BOTTOM = {"errors", "native"}
MIDDLE = {"optim", "basis", "samplers", "scores", "layers", "distributed"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "sizes": {"errors"},
    "native": {"errors"},
    "devices": {"errors"},
    "requirements": {"errors"},
    "uncompiled": set(),
    "progress": set(),
    "ops": {"errors", "native", "uncompiled", "ops"},
    "paging": {"errors", "native", "paging"},
    # It steps tensors of which each rank holds a part.
    "optim": {*BOTTOM, "ops", "paging", "distributed", "optim"},
    "basis": {*BOTTOM, "ops", "basis"},
    "samplers": {"errors", "samplers"},
    # What ranks share out is gathered to be looked at.
    "scores": {"errors", "progress", "distributed", "scores"},
    "distributed": {"errors", "files", "distributed"},
    # The bridge holds a basis for each layer; it knows no optimizer and no sampler.
    "layers": {"errors", "uncompiled", "ops", "basis", "distributed", "layers"},
    "methods": {"errors", "files", "sizes", "progress", "ops", "paging", *MIDDLE, "methods"},
    # Knows what methods are; no method knows of it. Its runs keep folders, checkpoints and pages as others do.
    "flow": {
        "errors",
        "files",
        "requirements",
        "devices",
        "uncompiled",
        "progress",
        "report",
        "ops",
        "paging",
        *MIDDLE,
        "methods",
        "train",
        "flow",
    },
    # A plan rehearses what a run would do, with its models and options.
    "plan": {*BOTTOM, "sizes", "ops", "paging", *MIDDLE, "methods", "flow", "train", "plan"},
    # Reads what runs wrote; knows none of what wrote it.
    "report": {"errors", "report"},
    # A run leaves its page, and a history in the page's format.
    "train": {
        *BOTTOM,
        "sizes",
        "devices",
        "files",
        "requirements",
        "report",
        "ops",
        "paging",
        *MIDDLE,
        "methods",
        "train",
    },
    # Reads rows and loads models as a run does.
    "evaluate": {"errors", "requirements", "devices", "progress", "ops", "layers", "methods", "train", "evaluate"},
    "difference": {"errors", "files", "progress", "layers", "methods", "train", "difference"},
    "trial": {"ops", "optim"},
    "info": {*BOTTOM, "devices", "ops", "trial"},
    "commands": {
        *BOTTOM,
        "sizes",
        "ops",
        "paging",
        *MIDDLE,
        "methods",
        "plan",
        "train",
        "report",
        "evaluate",
        "difference",
        "flow",
        "info",
        "requirements",
        "commands",
    },
    "cli": {"errors", "distributed", "commands"},
    # The package's own names.
    "__init__": {"errors", "layers", "optim", "methods", "flow", "plan"},
}
# Of these only the standard library may be imported.
PURE = {"samplers", "errors", "files", "report"}
# Modules of `train/` that subclass transformers' classes and are imported only where training starts.
TRAINERS = {"train/trainer.py", "train/progress.py", "train/history.py"}


class Import(NamedTuple):
    """One imported module: its dotted name, the line, and whether it is imported when the file is."""

    name: str
    line: int
    at_module_level: bool


def relative(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def room_of(file: Path) -> str:
    return relative(file).partition("/")[0].removesuffix(".py")


def type_checking_only(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST, at_module_level: bool = True) -> Iterator[Import]:
    """Yield every import; those in functions are not at module level, those for type checkers only are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_module_level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            names = [node.module] if node.module != "lisa_kernels" else [f"lisa_kernels.{a.name}" for a in node.names]
            yield from (Import(str(name), node.lineno, at_module_level) for name in names)
        elif isinstance(node, ast.If) and type_checking_only(node):
            yield from imports(ast.Module(node.orelse, []), at_module_level)
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports(node, at_module_level and not inside)


@cache
def imports_of(file: Path) -> list[Import]:
    return list(imports(ast.parse(file.read_text())))


ROOMS = {room: [file for file in FILES if room_of(file) == room] for room in sorted({room_of(file) for file in FILES})}


def broken_arrows(room: str, found: list[Import]) -> list[Import]:
    """Return the imports of other rooms that `room` may not make."""
    inner = [(item, item.name.split(".")) for item in found if item.name.split(".")[0] == "lisa_kernels"]
    return [item for item, parts in inner if len(parts) > 1 and parts[1] not in ALLOWED[room]]


def test_every_room_is_known() -> None:
    """A new room gets its arrows here before it is used."""
    assert {room_of(file) for file in FILES} <= ALLOWED.keys()


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_down(room: str) -> None:
    """cli → commands → plan → train → methods → {optim, basis, layers, distributed …} → {ops, paging} → torch."""
    for file in ROOMS[room]:
        assert not broken_arrows(room, imports_of(file)), relative(file)


def test_an_arrow_that_points_up_is_seen() -> None:
    """Negative control: an operation that imports an optimizer, at the top or in a function."""
    for source in ("from lisa_kernels.optim import AdamW8bit", "def f():\n    from lisa_kernels import optim"):
        assert broken_arrows("ops", list(imports(ast.parse(source))))


@pytest.mark.parametrize("room", sorted(PURE))
def test_samplers_know_the_standard_library_only(room: str) -> None:
    """Samplers need no torch and no numpy: they run wherever Python does."""
    for file in ROOMS[room]:
        outer = {item.name.split(".")[0] for item in imports_of(file)} - {"lisa_kernels", "__future__"}
        assert outer <= sys.stdlib_module_names, relative(file)


@pytest.mark.parametrize("room", ROOMS)
def test_outside_packages_are_imported_in_their_places(room: str) -> None:
    """Triton in kernels, ctypes at the edge of native libraries, transformers only for training, planning, layers."""
    for file, item in [(path, item) for path in ROOMS[room] for item in imports_of(path)]:
        top = item.name.split(".")[0]
        if top == "triton":
            assert file.name == "triton_kernel.py", (file, item)
        if top in ("ctypes", "cffi"):
            assert file.name in ("native.py", "cpu_kernel.py", "managed.py", "devices.py", "freed.py"), (file, item)
        if top in ("transformers", "datasets", "tokenizers", "accelerate", "peft"):
            assert room in ("train", "plan", "flow", "layers", "evaluate", "difference"), (file, item)
            assert not item.at_module_level or relative(file) in TRAINERS, (file, item)
        if item.name.startswith(("torch.distributed", "torch.nn.parallel")):
            assert room == "distributed", (file, item)
        if top == "matplotlib":
            assert not item.at_module_level, (file, item)


@pytest.mark.parametrize("room", ROOMS)
def test_no_environment_variable_is_read(room: str) -> None:
    """Settings are arguments: nothing reads or writes `os.environ`, but to say what was hidden or started by others."""
    known = {
        "devices.py": 'os.environ.get("CUDA_VISIBLE_DEVICES")',
        "distributed/launcher.py": "os.environ if told is None else told",
    }
    texts = {path: path.read_text() for path in ROOMS[room]}
    for path in texts:
        if (told := known.get(relative(path))) is not None:
            texts[path] = texts[path].replace(told, "None")
    for file, node in [(path, node) for path, text in texts.items() for node in ast.walk(ast.parse(text))]:
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        assert name not in ("environ", "environb", "getenv", "putenv"), (file, getattr(node, "lineno", 0))


def test_importing_the_package_loads_no_optional_package() -> None:
    """In a fresh process neither Triton nor the training stack comes with `import lisa_kernels`."""
    optional = ["triton", "transformers", "datasets", "tokenizers", "accelerate", "peft", "matplotlib"]
    program = f"import json, sys, lisa_kernels; print(json.dumps([n for n in {optional!r} if n in sys.modules]))"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, check=True, capture_output=True, text=True
    )
    assert json.loads(run.stdout) == []


def test_the_public_names_are_there() -> None:
    """What the documentation promises can be imported."""
    import lisa_kernels

    promised = (
        "AdamW8bit", "attach", "LISA", "OwLore", "OWS", "BAdam", "GaLore", "LoRA", "LoRAFA", "FullFineTune",
        "layer_scores", "GaLoreAdamW8bit", "plan", "TimestepExperts",
    )  # fmt: skip
    assert set(promised) <= set(lisa_kernels.__all__)
    assert all(hasattr(lisa_kernels, name) for name in lisa_kernels.__all__)
